"""Starts of the service with settings of all kinds, and certificates for them."""

from __future__ import annotations

import datetime
import re
import subprocess
import uuid
from pathlib import Path
from urllib.parse import quote

import psycopg
import psycopg.sql
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import service
from tests.support.postgres import Postgres
from tests.support.service_process import SECRET, Service, run_command
from tests.support.waiting import wait_until

PYTHON = ["python", "service.py"]
URL = "postgresql://user:hunterswordfish@127.0.0.1:1/db"


def run_with_settings(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that is expected to end, in an environment in which the service could serve, but for these."""
    return run_command(command, {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET, "PORT": "1"} | variables)


def refusal(**variables: str) -> str:
    """Return the sentence with which settings are refused."""
    settings = {"DATABASE_URL": URL, "BETTER_AUTH_SECRET": SECRET} | variables
    with pytest.raises(ValueError, match=r"\.$") as refused:
        service.Settings(settings)
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


# The two halves of the password in every URL below: neither may ever be printed.
HALVES = ("hunter", "swordfish")


def assert_nothing_leaked(output: str) -> None:
    assert "Traceback" not in output
    assert not any(half in output for half in HALVES)
    assert SECRET not in output


def assert_works(service: Service) -> None:
    """Assert that a task can be written and read back."""
    service.wait_until_ready()
    with service.client(f"user-{uuid.uuid4().hex}") as client:
        task = client.create("Buy milk")
        assert client.tasks() == [task]


def assert_waits(service: Service, reason: str) -> None:
    """Assert that a service that has just been started logs why it waits for the database."""
    line = re.compile(f"^waiting for the database: .*{reason}", re.MULTILINE)
    wait_until(lambda: line.search(service.log), otherwise=lambda: service.log)
    service.process.kill()  # it would be stopped, but only after waiting for some seconds


SPECIAL = "p@ss:w/o?r#d [x]%25%&=+;,$!'\"\\`^{|}~<>é"
HBA = """\
local all all trust
host all postgres all trust
host all all all scram-sha-256
"""


def secured_url(postgres: Postgres, database: str) -> str:
    return f"postgresql://{database}:{quote(SPECIAL, safe='')}@127.0.0.1:{postgres.port}/{database}"


def client_addresses(postgres: Postgres, database: str) -> set[str | None]:
    """Return where the connections to a database come from: None is a socket."""
    query = """
        SELECT host(client_addr) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'
    """
    with psycopg.connect(postgres.url()) as admin:
        return {row[0] for row in admin.execute(query, [database])}
