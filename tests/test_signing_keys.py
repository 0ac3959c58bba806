"""Public keys come in every form that providers hand out; a key that is for something else verifies nothing."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from server import signing_keys
from server.auth import Authenticator
from server.config import Settings, load
from server.errors import ConfigError, Problem
from server.signing_keys import read_public_key

KEYS = {"RS256": rsa.generate_private_key(65537, 2048), "ES256": ec.generate_private_key(ec.SECP256R1())}
OTHER = rsa.generate_private_key(65537, 2048)
WEAK = rsa.generate_private_key(65537, 1024)


def public_pem(key: Any) -> str:
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, kind).decode())


def private_pem(key: Any) -> str:
    kind, locked = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return str(key.private_bytes(serialization.Encoding.PEM, kind, locked).decode())


def certificate_pem(key: Any, signer: Any = None) -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "login")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def body(pem: str) -> str:
    """The base64 of a PEM block, in one line."""
    return "".join(pem.splitlines()[1:-1])


FORMS = {
    "PEM": lambda pem: pem,
    "PEM with blanks around": lambda pem: f"\n  {pem}\n\n",
    "PEM with CR": lambda pem: pem.replace("\n", "\r\n"),
    "PEM indented": lambda pem: textwrap.indent(pem, "    "),
    "line ends spelled out": lambda pem: pem.replace("\n", "\\n"),
    "line ends spelled out twice": lambda pem: pem.replace("\n", "\\\\n"),
    "CR and line ends spelled out": lambda pem: pem.replace("\n", "\\r\\n"),
    "PEM in one line": lambda pem: pem.replace("\n", " "),
    "PEM without line ends": lambda pem: pem.replace("\n", ""),
    "base64 of the PEM": lambda pem: base64.b64encode(pem.encode()).decode(),
    "base64 of the PEM in lines": lambda pem: base64.encodebytes(pem.encode()).decode(),
    "the body of the PEM": body,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pem_of", [public_pem, certificate_pem])
@pytest.mark.parametrize("algorithm", KEYS)
def test_public_key_is_read_in_any_form(algorithm: str, pem_of: Any, form: str) -> None:
    key = KEYS[algorithm]
    environ = {"JWT_ALGORITHMS": algorithm, "JWT_PUBLIC_KEY": FORMS[form](pem_of(key))}
    assert subject_of(Authenticator(load(environ)), key, algorithm) == "ada"


@pytest.mark.parametrize("form", FORMS)
def test_public_key_may_stand_in_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "key"
    path.write_text(FORMS[form](public_pem(OTHER)))
    settings = load({"JWT_ALGORITHMS": "RS256", "JWT_PUBLIC_KEY_FILE": str(path)})
    assert subject_of(Authenticator(settings), OTHER, "RS256") == "ada"


def test_public_key_in_a_file_may_be_binary(tmp_path: Path) -> None:
    path = tmp_path / "key.der"
    path.write_bytes(base64.b64decode(body(certificate_pem(OTHER))))
    settings = load({"JWT_ALGORITHMS": "RS256", "JWT_PUBLIC_KEY_FILE": str(path)})
    assert subject_of(Authenticator(settings), OTHER, "RS256") == "ada"


def test_public_key_of_pkcs1_and_of_ssh_is_read() -> None:
    public = OTHER.public_key()
    pkcs1 = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1).decode()
    ssh = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    for text in (pkcs1, pkcs1.replace("\n", " "), ssh):
        assert read_public_key(text) == public


def test_authorities_behind_a_certificate_sign_no_tokens() -> None:
    chain = certificate_pem(KEYS["RS256"], OTHER) + certificate_pem(OTHER)
    keys = Authenticator(load({"JWT_ALGORITHMS": "RS256", "JWT_PUBLIC_KEY": chain}))
    assert subject_of(keys, KEYS["RS256"], "RS256") == "ada"
    assert refusal_of(keys, OTHER, "RS256") == "Signature verification failed"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sesame", "an RSA or EC public key or its certificate, as PEM or base64"),
        ("c2VzYW1l", "an RSA or EC public key or its certificate, as PEM or base64"),
        (body(private_pem(OTHER)), "an RSA or EC public key or its certificate, as PEM or base64"),
        (base64.b64encode(private_pem(OTHER).encode()).decode(), "a public key, not a private one"),
        (public_pem(OTHER)[:-40], "an RSA or EC public key or its certificate, as PEM or base64"),
        (public_pem(OTHER).replace("MII", "MI!"), "an RSA or EC public key or its certificate, as PEM or base64"),
        (public_pem(ed25519.Ed25519PrivateKey.generate()), "an RSA or EC public key or its certificate"),
        (public_pem(OTHER) + public_pem(KEYS["RS256"]), "a public key, not several (JWT_JWKS_FILE takes several)"),
        ('{"kty":"RSA"}', "an RSA or EC public key or its certificate, as PEM or base64"),
    ],
)
def test_anything_else_is_no_public_key_and_is_not_shown(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Authenticator(load({"JWT_ALGORITHMS": "RS256", "JWT_PUBLIC_KEY": text}))
    assert str(caught.value).startswith(f"JWT_PUBLIC_KEY: expected {expected}")
    assert str(caught.value).endswith(f", got {len(text.strip())} characters")


@pytest.mark.parametrize("variable", ["JWT_PUBLIC_KEY", "JWT_PUBLIC_KEY_FILE"])
def test_private_key_is_refused_before_anything_uses_it(tmp_path: Path, variable: str) -> None:
    path, pem = tmp_path / "key", private_pem(OTHER)
    path.write_text(pem)
    with pytest.raises(ConfigError) as caught:
        load({"JWT_ALGORITHMS": "RS256", variable: pem if variable == "JWT_PUBLIC_KEY" else str(path)})
    assert "expected a public key, not a private one" in str(caught.value)
    assert body(pem)[:40] not in str(caught.value)


def test_public_key_is_no_shared_secret() -> None:
    with pytest.raises(ConfigError, match="JWT_SECRET: expected a shared secret, not a PEM key"):
        load({"JWT_SECRET": public_pem(OTHER).strip()})


# ---------------------------------------------------------------------- JWK sets


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), **members}


def write(path: Path, *entries: Any) -> str:
    path.write_text(json.dumps({"keys": entries}))
    return str(path)


def keys_of(path: Path, *entries: Any, algorithms: tuple[str, ...] = ("RS256",)) -> Authenticator:
    return Authenticator(Settings(jwt_algorithms=algorithms, jwt_jwks_file=write(path, *entries)))


def header_of(key: Any, algorithm: str, subject: str = "ada", **header: Any) -> bytes:
    claims = {"sub": subject, "exp": int(time.time()) + 60}
    return b"Bearer " + jwt.encode(claims, key, algorithm=algorithm, headers=header).encode()


def subject_of(keys: Authenticator, key: Any, algorithm: str, **header: Any) -> str:
    return keys.caller(header_of(key, algorithm, **header)).subject


def refusal_of(keys: Authenticator, key: Any, algorithm: str, **header: Any) -> str:
    with pytest.raises(Problem) as caught:
        subject_of(keys, key, algorithm, **header)
    assert caught.value.status == 401
    return caught.value.detail


def test_two_keys_of_one_kid_both_verify(tmp_path: Path) -> None:
    keys = keys_of(tmp_path / "jwks", jwk(KEYS["RS256"], kid="one"), jwk(OTHER, kid="one"))
    assert subject_of(keys, KEYS["RS256"], "RS256", kid="one") == "ada"
    assert subject_of(keys, OTHER, "RS256", kid="one") == "ada"


def test_keys_of_two_kinds_may_share_a_kid(tmp_path: Path) -> None:
    entries = [jwk(key, kid="one") for key in KEYS.values()]
    keys = keys_of(tmp_path / "jwks", *entries, algorithms=tuple(KEYS))
    for algorithm, key in KEYS.items():
        assert subject_of(keys, key, algorithm, kid="one") == "ada"


ELSEWHERE: list[dict[str, Any]] = [
    {"use": "enc"},
    {"use": "SIG"},
    {"use": 5},
    {"key_ops": ["encrypt"]},
    {"key_ops": ["sign"]},
    {"key_ops": []},
    {"key_ops": "verify"},
    {"use": "sig", "key_ops": ["wrapKey"]},
    {"use": "enc", "key_ops": ["verify"]},
    {"alg": "RSA-OAEP"},
    {"alg": "RS512"},
    {"alg": "PS256"},
    {"alg": "HS256"},
]


@pytest.mark.parametrize("members", ELSEWHERE)
def test_key_that_is_for_something_else_verifies_nothing(tmp_path: Path, members: dict[str, Any]) -> None:
    """RFC 7517, sections 4.2 to 4.4."""
    keys = keys_of(tmp_path / "jwks", jwk(KEYS["RS256"], kid="one"), jwk(OTHER, kid="two", **members))
    for header in ({}, {"kid": "two"}, {"kid": "one"}):
        assert refusal_of(keys, OTHER, "RS256", **header) == "Signature verification failed"
    with pytest.raises(ConfigError, match=r"expected a key for RS256, none fits: its (use|key_ops|alg) "):
        keys_of(tmp_path / "jwks", jwk(OTHER, kid="two", **members))


@pytest.mark.parametrize(
    "members",
    [
        {"use": "sig"},
        {"key_ops": ["verify"]},
        {"key_ops": ["sign", "verify"]},
        {"alg": "RS256"},
        {"use": None},
        {"kid": 5},
    ],
)
def test_key_that_is_for_signatures_verifies(tmp_path: Path, members: dict[str, Any]) -> None:
    assert subject_of(keys_of(tmp_path / "jwks", jwk(OTHER, **members)), OTHER, "RS256", kid="any") == "ada"


def test_keys_that_cannot_be_used_do_not_spoil_a_set(tmp_path: Path) -> None:
    odd = [{"kty": "OKP", "crv": "Ed25519", "x": "AA"}, {"kty": "RSA"}, {"kty": ["RSA"]}, 5, {"kty": "oct", "k": "AA"}]
    keys = keys_of(tmp_path / "jwks", *odd, jwk(WEAK, kid="weak"), jwk(OTHER))
    assert subject_of(keys, OTHER, "RS256") == "ada"
    with warnings.catch_warnings(action="ignore"):  # PyJWT's own, of who signs with so short a key
        assert refusal_of(keys, WEAK, "RS256", kid="weak") == "Signature verification failed"
    with pytest.raises(ConfigError, match="none fits: it has 1024 bits, expected at least 2048"):
        keys_of(tmp_path / "jwks", jwk(WEAK))


def test_private_key_in_a_set_is_refused(tmp_path: Path) -> None:
    private = jwt.algorithms.RSAAlgorithm.to_jwk(OTHER, as_dict=True)
    with pytest.raises(ConfigError, match=r"JWT_JWKS_FILE: .*: a key of it is private") as caught:
        keys_of(tmp_path / "jwks", private)
    assert private["d"][:20] not in str(caught.value)


# ---------------------------------------------------------------------- a file that changes


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the file with every token."""
    monkeypatch.setattr(signing_keys, "LOOK_EVERY_S", 0.0)


@pytest.mark.parametrize("renamed", [False, True])
def test_keys_are_read_again_when_their_file_changes(tmp_path: Path, renamed: bool) -> None:
    path = tmp_path / "jwks"
    keys, old = keys_of(path, jwk(KEYS["RS256"])), header_of(KEYS["RS256"], "RS256")
    assert keys.caller(old).subject == "ada"
    if renamed:
        write(tmp_path / "new", jwk(OTHER))
        (tmp_path / "new").rename(path)
    else:
        write(path, jwk(OTHER))
    assert subject_of(keys, OTHER, "RS256") == "ada"
    with pytest.raises(Problem):  # though it was remembered
        keys.caller(old)


def test_directory_swapped_as_kubernetes_does_it_is_followed(tmp_path: Path) -> None:
    for name, key in (("one", KEYS["RS256"]), ("two", OTHER)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "jwks", jwk(key))
    link = tmp_path / "data"
    link.symlink_to("one")
    keys = Authenticator(Settings(jwt_algorithms=("RS256",), jwt_jwks_file=str(link / "jwks")))
    (tmp_path / "link").symlink_to("two")
    (tmp_path / "link").rename(link)
    assert subject_of(keys, OTHER, "RS256") == "ada"


@pytest.mark.parametrize("broken", [None, "", '{"keys":[', "[]", '{"keys":[]}', "\ud800", "useless"])
def test_broken_file_leaves_the_keys_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    path = tmp_path / "jwks"
    keys = keys_of(path, jwk(KEYS["RS256"]))
    whole = path.read_text()
    if broken is None:
        path.unlink()
    elif broken == "useless":
        write(path, jwk(OTHER, use="enc"))
    else:
        path.write_bytes(broken.encode(errors="surrogatepass"))
    caplog.set_level(logging.INFO, "server.signing_keys")
    for _ in range(3):
        assert subject_of(keys, KEYS["RS256"], "RS256") == "ada"
    (line,) = caplog.messages
    assert line.startswith("JWT_JWKS_FILE cannot be used now, the keys read before stay: ")
    path.write_text(whole)
    for _ in range(3):
        assert subject_of(keys, KEYS["RS256"], "RS256") == "ada"
    assert caplog.messages == [line, "JWT_JWKS_FILE can be used again"]
    write(path, jwk(OTHER, kid="new"))
    assert subject_of(keys, OTHER, "RS256") == "ada"
    assert caplog.messages[-1] == "JWT_JWKS_FILE has changed: its keys are 'new'"


def test_file_is_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(signing_keys, "LOOK_EVERY_S", 1.0)
    monkeypatch.setattr(signing_keys.time, "monotonic", lambda: now[0])
    keys = keys_of(tmp_path / "jwks", jwk(KEYS["RS256"]))
    write(tmp_path / "jwks", jwk(OTHER))
    now[0] += 0.9
    assert refusal_of(keys, OTHER, "RS256")
    now[0] += 0.2
    assert subject_of(keys, OTHER, "RS256") == "ada"
