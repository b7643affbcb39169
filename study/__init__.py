"""The study: when an explanation helps against forgetting, measured in pieces that resume."""
