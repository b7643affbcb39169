"""How numbers are shown."""


def share(value: float) -> str:
    """Format a share as ``25%`` or ``12.5%``: two shares never look the same."""
    return f"{100 * value:.10g}%"
