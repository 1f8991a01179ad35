"""What it costs to know the caller: `uv run tests/bench/tokens.py`.

For each algorithm, the microseconds of CPU that a token takes when it is first seen, and when it is seen again.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

sys.path.insert(0, str(Path(__file__).parents[2]))
SECRET = "a secret for the benchmark, of 32 characters or more"
ISSUER = "https://app.example.com"
os.environ |= {"DATABASE_URL": "postgresql://localhost", "BETTER_AUTH_SECRET": SECRET, "BETTER_AUTH_URL": ISSUER}

import service  # noqa: E402  it reads its settings when it is imported

TOKENS = 300
ROUNDS = 7

PRIVATE_KEYS: dict[str, Any] = {
    "HS256": SECRET,
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "RS256": rsa.generate_private_key(65537, 2048),
    "PS256": rsa.generate_private_key(65537, 2048),
}


def key_set() -> bytes:
    """Return the public keys as an issuer publishes them."""
    keys = []
    for algorithm, key in PRIVATE_KEYS.items():
        if algorithm != "HS256":
            jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
            keys.append(jwk | {"kid": algorithm, "alg": algorithm})
    return json.dumps({"keys": keys}).encode()


def headers(algorithm: str) -> list[str]:
    """Return the Authorization headers of many users."""
    claims = {"iss": ISSUER, "aud": ISSUER, "exp": int(time.time()) + 3600, "iat": int(time.time())}
    key, kid = PRIVATE_KEYS[algorithm], {"kid": algorithm}
    users = [f"{algorithm}-{number}" for number in range(TOKENS)]
    return ["Bearer " + jwt.encode(claims | {"sub": user}, key, algorithm, kid) for user in users]


async def cost(identity: service.Identity, tokens: list[str]) -> float:
    """Return the microseconds of CPU that a token takes."""
    started = time.process_time()
    for token in tokens:
        await identity.caller(token)
    return (time.process_time() - started) / len(tokens) * 1e6


async def main() -> None:
    print(f"{'algorithm':<10}{'first use, µs':>15}{'second use, µs':>16}")
    for algorithm in PRIVATE_KEYS:
        tokens = headers(algorithm)
        firsts, seconds = [], []
        for _ in range(ROUNDS):
            identity = service.Identity(service.Settings(os.environ))
            identity.keys = service.read_key_set(key_set())
            firsts.append(await cost(identity, tokens))
            seconds.append(await cost(identity, tokens))
        print(f"{algorithm:<10}{statistics.median(firsts):>15.1f}{statistics.median(seconds):>16.1f}")


if __name__ == "__main__":
    asyncio.run(main())
