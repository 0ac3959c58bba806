"""Only a token that we would sign ourselves gets in, and what refuses it says no more than it should."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from server import auth
from server.auth import Authenticator, Caller, ClientAddress, FailureLimit, issue
from server.config import Settings
from server.errors import ConfigError, Problem

SECRET = b"the secret of these tests, 42 bytes long.."
PREVIOUS = b"the secret before that one, 42 bytes long."
RSA_KEY = rsa.generate_private_key(65537, 2048)
WEAK_KEY = rsa.generate_private_key(65537, 1024)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
CHALLENGE = re.compile(
    r'Bearer realm="scoreboard"(, error="invalid_token", error_description="[\x20\x21\x23-\x5b\x5d-\x7e]+")?'
)


def authenticator(**settings: Any) -> Authenticator:
    return Authenticator(Settings(**{"jwt_secret": SECRET, **settings}))


def claims(**changes: Any) -> dict[str, Any]:
    return {"sub": "ada", "exp": int(time.time()) + 60, **changes}


def bearer(payload: dict[str, Any], key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> bytes:
    return b"Bearer " + jwt.encode(payload, key, algorithm=algorithm, headers=header).encode()


def signed(payload: bytes, header: bytes = b'{"alg":"HS256","typ":"JWT"}', key: bytes = SECRET) -> bytes:
    """A token of any bytes whatever, with a right signature."""
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, payload)]
    signature = hmac.new(key, b".".join(parts), hashlib.sha256).digest()
    return b"Bearer " + b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")])


def pem(key: Any) -> bytes:
    return bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def jwks_file(directory: Path, **keys: Any) -> str:
    entries = []
    for kid, key in keys.items():
        algorithm = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
        entries.append({**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid})
    path = directory / "jwks.json"
    path.write_text(json.dumps({"keys": entries}))
    return str(path)


def refusal(header: bytes, authenticator: Authenticator) -> str:
    """Why the header is refused; checks that it is a proper 401."""
    with pytest.raises(Problem) as caught:
        authenticator.caller(header)
    problem = caught.value
    assert problem.status == 401
    ((name, value),) = problem.headers
    assert name == "WWW-Authenticate"
    assert CHALLENGE.fullmatch(value)
    return problem.detail


# ---------------------------------------------------------------------- who


def test_issued_token_is_accepted() -> None:
    caller = authenticator().caller(b"Bearer " + issue(SECRET, "ada", ttl_s=60).encode())
    assert caller.subject == "ada"
    assert not caller.is_writer
    assert 58 <= caller.expires_s - time.time() <= 60


def test_scheme_is_compared_without_case() -> None:
    assert authenticator().caller(bearer(claims()).replace(b"Bearer", b"bEARER")).subject == "ada"


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Basic YTpi", b"Token abc"])
def test_missing_token_is_asked_for_without_an_error_code(header: bytes) -> None:
    with pytest.raises(Problem) as caught:
        authenticator().caller(header)
    # RFC 6750, section 3.1: no error code for a request without credentials.
    assert caught.value.headers == (("WWW-Authenticate", 'Bearer realm="scoreboard"'),)


@pytest.mark.parametrize(
    "scope", ["scores:write", "a scores:write b", ["scores:write"], ["a", "scores:write"], ["scores:write", 5]]
)
def test_scope_as_text_or_list_makes_a_writer(scope: Any) -> None:
    assert authenticator().caller(bearer(claims(scope=scope))).is_writer


@pytest.mark.parametrize("scope", ["", "scores:writer", "scores:write,other", "SCORES:WRITE", [], [["scores:write"]]])
def test_other_scopes_make_no_writer(scope: Any) -> None:
    assert not authenticator().caller(bearer(claims(scope=scope))).is_writer


@pytest.mark.parametrize("name", ["scope", "scp"])
@pytest.mark.parametrize("scope", [5, True, {"scores:write": True}])
def test_scope_of_another_kind_is_refused(name: str, scope: Any) -> None:
    assert refusal(bearer(claims(**{name: scope})), authenticator()) == f"expected a {name} that is text or a list"


@pytest.mark.parametrize("scp", ["scores:write", "a scores:write", ["a", "scores:write"]])
@pytest.mark.parametrize("beside", [{}, {"scope": None}, {"scope": ""}, {"scope": "other"}, {"scope": []}])
def test_scp_is_another_name_of_scope(scp: Any, beside: dict[str, Any]) -> None:
    assert authenticator().caller(bearer(claims(scp=scp, **beside))).is_writer


@pytest.mark.parametrize("claim", ["scope", "scp", "nbf", "iat", "jti", "aud", "iss"])
def test_claim_that_is_null_is_none(claim: str) -> None:
    caller = authenticator().caller(signed(json.dumps(claims(**{claim: None})).encode()))
    assert (caller.subject, caller.is_writer) == ("ada", False)


@pytest.mark.parametrize(("setting", "claim"), [("jwt_audience", "aud"), ("jwt_issuer", "iss")])
def test_required_claim_that_is_null_is_missing(setting: str, claim: str) -> None:
    assert claim in refusal(signed(json.dumps(claims(**{claim: None})).encode()), authenticator(**{setting: "mine"}))


@pytest.mark.parametrize(
    ("audience", "accepted"),
    [("mine", True), (["other", "mine"], True), (["other"], False), ([], False), (["mine", 5], False), (5, False)],
)
def test_audience_may_be_a_list(audience: Any, accepted: bool) -> None:
    strict, header = authenticator(jwt_audience="mine"), bearer(claims(aud=audience))
    if accepted:
        assert strict.caller(header).subject == "ada"
    else:
        assert refusal(header, strict)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("past", ["0", "-5", "1.5e9", "1500000000.25"])
def test_not_before_and_issued_at_may_be_any_number(claim: str, past: str) -> None:
    header = signed(b'{"sub":"ada","exp":9999999999,"%s":%s}' % (claim.encode(), past.encode()))
    assert authenticator().caller(header).subject == "ada"


@pytest.mark.parametrize("claim", ["nbf", "iat"])
@pytest.mark.parametrize("value", ['"x"', "[1]", "{}", "1e400", "NaN", "9999999999", "9999999999.5"])
def test_not_before_and_issued_at_that_are_no_time_past_are_refused_by_name(claim: str, value: str) -> None:
    header = signed(b'{"sub":"ada","exp":99999999999,"%s":%s}' % (claim.encode(), value.encode()))
    assert f"({claim})" in refusal(header, authenticator())


@pytest.mark.parametrize(
    ("policy", "writer", "player", "allowed"),
    [
        ("own", False, "ada", True),
        ("own", False, "bob", False),
        ("own", False, "ADA", False),
        ("own", True, "bob", True),
        ("any", False, "bob", True),
    ],
)
def test_who_may_write_whom(policy: Any, writer: bool, player: str, allowed: bool) -> None:
    assert authenticator(write_policy=policy).may_write(Caller("ada", writer, 0), player) is allowed


# ---------------------------------------------------------------------- signatures


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", "", None, 5, ["HS256"], {"alg": "HS256"}, "HS512", "RS256"])
def test_algorithm_that_is_not_allowed_is_refused(alg: Any) -> None:
    header = json.dumps({"alg": alg, "typ": "JWT"}).encode()
    for token in (signed(json.dumps(claims()).encode(), header), jwt_unsigned(header)):
        assert refusal(token, authenticator())


def jwt_unsigned(header: bytes) -> bytes:
    parts = (header, json.dumps(claims()).encode())
    return b"Bearer " + b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts) + b"."


def test_wrong_signature_is_refused() -> None:
    assert refusal(bearer(claims(), PREVIOUS), authenticator()) == "Signature verification failed"


def test_changed_payload_is_refused() -> None:
    head, _, tail = bearer(claims()).split(b".")
    forged = base64.urlsafe_b64encode(json.dumps(claims(sub="bob")).encode()).rstrip(b"=")
    assert refusal(b".".join([head, forged, tail]), authenticator()) == "Signature verification failed"


def test_public_key_is_no_secret() -> None:
    both = authenticator(jwt_algorithms=("RS256", "HS256"), jwt_public_key=pem(RSA_KEY).decode())
    for key in (pem(RSA_KEY), pem(RSA_KEY).strip()):
        assert refusal(signed(json.dumps(claims()).encode(), key=key), both) == "Signature verification failed"
    only = authenticator(jwt_algorithms=("RS256",), jwt_public_key=pem(RSA_KEY).decode())
    assert "algorithm" in refusal(signed(json.dumps(claims()).encode(), key=pem(RSA_KEY)), only)
    assert only.caller(bearer(claims(), RSA_KEY, "RS256")).subject == "ada"


def test_previous_secret_stays_valid_while_it_is_set() -> None:
    assert authenticator(jwt_secret_previous=PREVIOUS).caller(bearer(claims(), PREVIOUS)).subject == "ada"
    assert authenticator(jwt_secret_previous=PREVIOUS).caller(bearer(claims(), SECRET)).subject == "ada"


def test_key_of_a_set_is_chosen_by_its_kid(tmp_path: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    keys = authenticator(jwt_algorithms=("RS256",), jwt_jwks_file=jwks_file(tmp_path, one=RSA_KEY, two=other))
    assert keys.caller(bearer(claims(), other, "RS256", kid="two")).subject == "ada"
    assert refusal(bearer(claims(), other, "RS256", kid="one"), keys) == "Signature verification failed"


@pytest.mark.parametrize("kid", [{}, {"kid": "unknown"}])
def test_key_without_a_known_kid_is_found_among_those_of_other_kinds(tmp_path: Path, kid: dict[str, str]) -> None:
    path = jwks_file(tmp_path, curve=EC_KEY, rsa=RSA_KEY)
    keys = authenticator(jwt_algorithms=("RS256", "ES256"), jwt_jwks_file=path)
    assert keys.caller(bearer(claims(), RSA_KEY, "RS256", **kid)).subject == "ada"
    assert keys.caller(bearer(claims(), EC_KEY, "ES256", **kid)).subject == "ada"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwt_secret": None}, "JWT_SECRET: expected at least 32 bytes for HS256, got none"),
        ({"jwt_algorithms": ("HS512",)}, "JWT_SECRET: expected at least 64 bytes for HS512, got 42"),
        ({"jwt_algorithms": ("RS256",)}, "expected a key for RS256, got none"),
        (
            {"jwt_algorithms": ("RS256",), "jwt_public_key": "no PEM"},
            "JWT_PUBLIC_KEY: expected an RSA or EC public key",
        ),
        ({"jwt_algorithms": ("ES256",), "jwt_public_key": pem(RSA_KEY).decode()}, "a key for ES256, none fits"),
        (
            {"jwt_algorithms": ("HS384",), "jwt_secret": SECRET * 2, "jwt_secret_previous": PREVIOUS},
            "JWT_SECRET_PREVIOUS: expected at least 48 bytes for HS384, got 42",
        ),
        (
            {"jwt_algorithms": ("RS256",), "jwt_public_key": pem(WEAK_KEY).decode()},
            "expected a key for RS256, none fits: it has 1024 bits, expected at least 2048",
        ),
        (
            {"jwt_algorithms": ("ES384",), "jwt_public_key": pem(EC_KEY).decode()},
            "expected a key for ES384, none fits: it is an EC key of the curve secp256r1",
        ),
        ({"jwt_jwks_file": "/nowhere.json"}, "JWT_JWKS_FILE: expected a file with a JWK set"),
    ],
)
def test_missing_or_unfit_key_is_said_at_the_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        authenticator(**settings)


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"keys":[]}', '{"keys":[5]}', '{"keys":[{"kty":"x"}]}'])
def test_file_that_is_no_key_set_is_said_at_the_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="JWT_JWKS_FILE: expected a file with a JWK set"):
        authenticator(jwt_algorithms=("RS256",), jwt_jwks_file=str(path))


# ---------------------------------------------------------------------- claims


def test_expiry_is_looked_at_on_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    one, header = authenticator(), bearer(claims(exp=int(time.time()) + 60))
    assert one.caller(header) is one.caller(header), "expected the second to come from memory"
    later = time.time() + 61
    monkeypatch.setattr(auth.time, "time", lambda: later)
    assert refusal(header, one) == "the token has expired"
    assert header not in one._callers


def test_expiry_has_no_leeway() -> None:
    assert refusal(bearer(claims(exp=int(time.time()) - 1)), authenticator(jwt_leeway_s=30)) == "the token has expired"


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_not_before_and_issued_at_have_leeway(claim: str) -> None:
    now_s = int(time.time())
    assert authenticator().caller(bearer(claims(**{claim: now_s + 25}))).subject == "ada"
    assert f"({claim})" in refusal(bearer(claims(**{claim: now_s + 35})), authenticator())
    assert f"({claim})" in refusal(bearer(claims(**{claim: now_s + 5})), authenticator(jwt_leeway_s=0))


@pytest.mark.parametrize("claim", ["exp", "sub"])
def test_required_claim_is_missed_by_name(claim: str) -> None:
    payload = claims()
    del payload[claim]
    assert claim in refusal(bearer(payload), authenticator())
    assert claim in refusal(bearer({**payload, claim: None}), authenticator())


@pytest.mark.parametrize(
    "exp", ["1e400", "-1e400", "NaN", "-5", "0", "true", '"9999999999"', '"x"', "[1]", "{}", "1" + "0" * 400]
)
def test_expiry_that_is_no_time_to_come_is_refused(exp: str) -> None:
    assert refusal(signed(b'{"sub":"ada","exp":%s}' % exp.encode()), authenticator())


def test_expiry_with_fractions_is_accepted() -> None:
    assert authenticator().caller(signed(b'{"sub":"ada","exp":9999999999.5}')).expires_s == 9999999999.5


@pytest.mark.parametrize(
    "sub", ['""', "5", "[]", "{}", "true", '"a\\nb"', '"\\u0000"', '"\\u0085"', '"\\ud800"', '"%s"' % ("x" * 129)]
)
def test_subject_that_can_be_no_player_is_refused(sub: str) -> None:
    assert refusal(signed(b'{"sub":%s,"exp":9999999999}' % sub.encode()), authenticator())


@pytest.mark.parametrize("sub", ["x" * 128, "Ada Lovelace", "ädä", "玩家", "🎮" * 128, "a:b%c", "'\"\\"])
def test_any_other_text_is_a_subject(sub: str) -> None:
    assert authenticator().caller(bearer(claims(sub=sub))).subject == sub


@pytest.mark.parametrize(
    ("setting", "claim"), [("jwt_audience", "aud"), ("jwt_issuer", "iss")], ids=["audience", "issuer"]
)
def test_audience_and_issuer_count_only_when_set(setting: str, claim: str) -> None:
    mine, other = bearer(claims(**{claim: "mine"})), bearer(claims(**{claim: "other"}))
    assert authenticator().caller(other).subject == "ada"
    strict = authenticator(**{setting: "mine"})
    assert strict.caller(mine).subject == "ada"
    assert refusal(other, strict)
    assert refusal(bearer(claims()), strict)


@pytest.mark.parametrize(
    ("payload", "header"),
    [
        (b'{"sub":"ada","exp":9999999999,"x":' + b"[" * 2_500 + b"]" * 2_500 + b"}", b'{"alg":"HS256"}'),
        (b"{}", b"[" * 2_500 + b"]" * 2_500),
        (b"[]", b'{"alg":"HS256"}'),
        (b"\xff\xfe", b'{"alg":"HS256"}'),
        (b"", b""),
        (b'{"sub":"ada","exp":9999999999}', b'{"alg":"HS256","kid":["x"]}'),
        (b'{"sub":"ada","exp":9999999999}', b'{"alg":"HS256","crit":["x\\"\\r\\ny"]}'),
        (b'{"sub":"ada","exp":9999999999}', b'{"alg":"HS256","b64":false}'),
        (b'{"sub":"ada","exp":9999999999,"iat":' + b"9" * 5000 + b"}", b'{"alg":"HS256"}'),
    ],
)
def test_hostile_token_is_refused_like_any_other(payload: bytes, header: bytes) -> None:
    assert refusal(signed(payload, header), authenticator())


@given(st.one_of(st.binary(), st.binary().map(lambda token: b"Bearer " + token)))
def test_any_bytes_for_a_header_are_refused_with_401(header: bytes) -> None:
    refusal(header, authenticator())


@given(st.binary(), st.binary())
def test_any_bytes_with_a_right_signature_are_refused_with_401(payload: bytes, header: bytes) -> None:
    refusal(signed(payload, header), authenticator())


words = st.text("ab: é\0\n\ud800")
values = st.none() | st.booleans() | st.integers() | st.floats() | words | st.lists(words, max_size=2)


@given(
    st.fixed_dictionaries(
        {"sub": values, "exp": st.just(9999999999) | values},
        optional=dict.fromkeys(["nbf", "iat", "aud", "iss", "jti", "scope"], values),
    )
)
def test_any_claims_give_a_caller_or_401(payload: dict[str, Any]) -> None:
    header = signed(json.dumps(payload).encode())
    try:
        caller = authenticator().caller(header)
    except Problem:
        refusal(header, authenticator())
    else:
        assert caller.subject == payload["sub"]
        assert caller.expires_s > time.time()


def test_memory_for_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHE_SIZE", 10)
    one = authenticator()
    headers = [bearer(claims(sub=f"player{number}")) for number in range(25)]
    for header in headers:
        one.caller(header)
    assert list(one._callers) == headers[-10:]


def test_refused_tokens_are_not_remembered() -> None:
    one = authenticator()
    refusal(bearer(claims(), PREVIOUS), one)
    assert not one._callers


# ---------------------------------------------------------------------- addresses


PROXIES = ClientAddress(("10.0.0.0/8", "2001:db8:ffff::1"))


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("9.9.9.9", "", "9.9.9.9"),
        ("9.9.9.9", "1.2.3.4", "9.9.9.9"),  # not one of our proxies: it can say what it likes
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),  # the first is what the client claimed
        ("10.0.0.1", "1.2.3.4, 10.0.0.2,10.0.0.3", "1.2.3.4"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "6.6.6.6, unknown", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6, 1.2.3.4:5678", "1.2.3.4"),
        ("10.0.0.1", "6.6.6.6:1, 1.2.3.4:5678, 10.0.0.2:80", "1.2.3.4"),
        ("10.0.0.1", "[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("10.0.0.1", "[2001:db8:1:2::9]", "2001:db8:1:2::/64"),
        ("10.0.0.1", "2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("10.0.0.1", "1.2.3.4, [2001:db8:ffff::1]:443", "1.2.3.4"),
        ("10.0.0.1", "[::ffff:1.2.3.4]:443", "1.2.3.4"),
        ("10.0.0.1", "::ffff:1.2.3.4", "1.2.3.4"),
        ("10.0.0.1", "1.2.3.4,,", "1.2.3.4"),
        ("10.0.0.1", " , 1.2.3.4 , ,10.0.0.2\t", "1.2.3.4"),
        ("10.0.0.1", ", ,", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:port", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4:567890", "10.0.0.1"),
        ("10.0.0.1", "[1.2.3.4", "10.0.0.1"),
        ("10.0.0.1", "[]:80", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4, 10.0.0.256", "10.0.0.1"),
        ("10.0.0.1", "1.2.3.4, 10.0.0.2;by=x", "10.0.0.1"),
        ("9.9.9.9", "1.2.3.4:5678", "9.9.9.9"),
        ("::ffff:10.0.0.1", "::ffff:1.2.3.4", "1.2.3.4"),
        ("0000:0000:0000:0000:0000:ffff:0a00:0001", "1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "", "2001:db8:1:2::/64"),
        ("2001:db8:ffff::1", "2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("", "1.2.3.4", ""),
    ],
)
def test_address_that_counts(peer: str, forwarded_for: str, address: str) -> None:
    assert PROXIES.of(peer, forwarded_for) == address


def test_header_matters_only_behind_proxies() -> None:
    assert PROXIES.needs_header
    assert not ClientAddress(()).needs_header
    assert ClientAddress(()).of("10.0.0.1", "1.2.3.4") == "10.0.0.1"


@given(st.text("0123456789abcdef.:%/[], \0é"))
def test_any_header_leaves_an_address_to_count(forwarded_for: str) -> None:
    assert PROXIES.of("10.0.0.1", forwarded_for)
    assert PROXIES.of("9.9.9.9", forwarded_for) == "9.9.9.9"


# ---------------------------------------------------------------------- failures


def test_failures_are_free_up_to_the_limit_and_then_one_has_to_wait() -> None:
    limit = FailureLimit(60)
    assert [limit.failed("a", 100.0) for _ in range(60)] == [0.0] * 60
    assert limit.failed("a", 100.0) == pytest.approx(1.0)
    assert limit.failed("b", 100.0) == 0.0, "another address is another matter"
    assert limit.failed("a", 100.5) == pytest.approx(0.5)
    assert limit.failed("a", 101.0) == 0.0
    assert limit.failed("a", 101.0) > 0
    assert [limit.failed("a", 1000.0) for _ in range(61)] == [0.0] * 60 + [pytest.approx(1.0)]


def test_no_limit_counts_nothing() -> None:
    limit = FailureLimit(0)
    assert {limit.failed("a", 100.0) for _ in range(1000)} == {0.0}


def test_memory_for_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "FAILING_ADDRESSES", 10)
    limit = FailureLimit(60)
    for number in range(25):
        limit.failed(f"address{number}", 100.0)
    assert list(limit._arrivals_s) == [f"address{number}" for number in range(15, 25)]
