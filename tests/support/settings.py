"""Starts of the service with settings of all kinds, and certificates for them."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import service
from tests.support.service_process import ROOT, SECRET, environment

PYTHON = ["python", "service.py"]
URL = "postgresql://user:hunterswordfish@127.0.0.1:1/db"


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET, "PORT": "1"} | variables
    return subprocess.run(
        command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=20, check=False
    )


def refusal(**variables: str) -> str:
    """Return the sentence with which settings are refused."""
    settings = {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET} | variables
    with pytest.raises(service.SettingError) as refused:
        service.read_settings(service.given_in(settings))
    return str(refused.value)


def write_certificate(certificate: Path, key: Path) -> None:
    """Write a self-signed certificate for localhost, which is valid for a day, and its key."""
    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, private_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(private_key, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
