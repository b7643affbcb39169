"""Secrets in the place of MLflow's store, and fragments of them, are redacted."""

import pytest

from permafrost.tracking import redact


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:s3cr3t@host/path", "https://host/path"),
        ("https://user:s3@cr3t/@host:5000", "https://host:5000"),
        ("https://s3cr3t@host", "https://host"),
        ("postgresql://user:s3cr3t@host/db", "postgresql://host/db"),
        ("postgresql+psycopg2://user:s3cr3t@host/db", "postgresql+psycopg2://host/db"),
        (
            "mysql+pymysql://host/db?user=me&password=s3cr3t",
            "mysql+pymysql://host/db?user=me&password=***",
        ),
        ("https://host/?sv=2026&sig=s3cr3t", "https://host/?sv=***&sig=***"),
        ("postgresql:///db?sslpassword=s3cr3t%21", "postgresql:///db?sslpassword=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_secrets_are_redacted(uri, shown, monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    assert redact(uri, uri) == shown
    assert redact(f"cannot connect to {uri}: gone", uri) == f"cannot connect to {shown}: gone"


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:s3cr3t%2F@host",
        "https://s3cr3t%2F@host",
        "postgresql://user:s3cr3t%2F@host/db",
        "mysql://host/db?password=s3cr3t%2F&x=1",
        "mysql://host/db?x=1&ssl_key=s3cr3t%2F",
        "https://host/path?api-key=s3cr3t%2F",
        "https://host/path?v=s3cr3t%2F#top",
        "postgresql://host/db?x-sig.v2=s3cr3t%2F",
    ],
)
def test_fragments_of_a_secret_are_redacted(uri):
    text = "bad password s3cr3t%2F (s3cr3t/, Basic dXNlcjpzM2NyM3Qv)"
    assert redact(text, uri).startswith("bad password *** (***, Basic ")
    if "user:" in uri:
        assert redact(text, uri) == "bad password *** (***, Basic ***)"
    assert redact(text, "http://host") == text
