"""No secret of the tracking URI or of MLflow's environment reaches a message, tag or file."""

import os
import re
from base64 import b64encode
from urllib.parse import unquote

_ACCOUNT = re.compile(r"(?<!sqlite)://(\S*)@")


def redact(text: str, uri: str) -> str:
    """Strip user names, passwords and tokens, those of the URI and of MLflow's environment."""
    text = _ACCOUNT.sub("://", text)
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(uri: str) -> set[str]:
    user, password, token = (
        os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD", "TOKEN")
    )
    found = {password, token, _basic(user, password)}
    if account := _ACCOUNT.search(uri):
        user, _, password = account[1].partition(":")
        found |= {password or user, _basic(unquote(user), unquote(password))}
    # A server's options, such as a gateway's key, may have any name.
    named = "" if uri.startswith("http") else "(?:pass|pwd|secret|token|key|auth|sig|cred)"
    found |= set(re.findall(rf"[?&][^=&#]*{named}[^=&#]*=([^&#]*)", uri, re.IGNORECASE))
    return (found | {unquote(secret) for secret in found}) - {""}


def _basic(user: str, password: str) -> str:
    """Return an account as HTTP sends it."""
    return b64encode(f"{user}:{password}".encode()).decode() if password else ""
