"""Redaction of secrets in command lines and settings."""

from __future__ import annotations

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devguard.support.redaction import LONGEST, redact, redact_command, redact_setting

SECRET = "S3cr3t/x+y_z=Q"
NAMES = (
    "api-key", "api_key", "apiKey", "apikey", "openai-api-key", "token", "hf-token", "hf_token", "auth-token", "auth",
    "password", "db-password", "passwd", "pwd", "pass", "secret", "client-secret", "access-key", "private_key", "key",
    "bearer", "passphrase", "credentials", "admin-api-key", "api-key-2",
)  # fmt: skip
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD",
    "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "MYSQL_PWD", "KEY", "GITHUB_TOKEN", "DB_PASS", "SECRET_KEY",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dash", ["--", "-"])
def test_the_value_of_a_secret_option_is_redacted(name: str, dash: str) -> None:
    for words in ([f"{dash}{name}={SECRET}"], [f"{dash}{name}", SECRET], [f"{dash}{name}", f"-{SECRET}"]):
        shown = redact_command(["python", "serve.py", *words, "--port", "8000"])
        assert SECRET not in shown
        assert name in shown
        assert shown.endswith("--port 8000")


@pytest.mark.parametrize("name", VARIABLES)
def test_the_value_of_a_secret_variable_is_redacted(name: str) -> None:
    for text in (
        f"{name}={SECRET}",
        f"--env={name}={SECRET}",
        f"-e{name}={SECRET}",
        f"+run.{name}={SECRET}",
        f'{{"{name}": "{SECRET}", "port": 1}}',
        f"{{'{name}': '{SECRET} {SECRET}'}}",
        f"import os; os.environ['{name}'] = '{SECRET}'",
        f"{name}: {SECRET}",
    ):
        shown = redact_command(["env", text, "python"])
        assert SECRET not in shown
        assert name in shown
    assert redact_setting(name, SECRET) == "***"


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}",
        f"authorization=Basic {SECRET}",
        f"bearer {SECRET}",
        f"--authorization Bearer {SECRET}",
        f"--header=X-Api-Key: {SECRET}",
        f"postgres://me:{SECRET.replace('/', '')}@db/x",
        f"https://{SECRET.replace('/', '')}@host/x.git",
        f"https://host/x?token={SECRET}&n=1",
        "hf_" + "aB3" * 11,
        "ghp_" + "aB3" * 12,
        "sk-proj-" + "aB3" * 12,
        "AKIA" + "ABCD1234" * 2,
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_without_an_option_are_redacted(text: str) -> None:
    secret = max(re.split(r"[ @:?&]", text), key=len) if SECRET not in text else SECRET
    for shown in (redact_command(["x", text]), redact_command(["x", *text.split(" ")]), redact(text)):
        assert secret not in shown
        assert SECRET.replace("/", "") not in shown
        assert "***" in shown


@pytest.mark.parametrize(
    "words",
    [
        ["python", "-m", "sglang.launch_server", "--model-path", "m", "--tokenizer-path", "t", "--max-tokens", "5"],
        ["torchrun", "--nproc-per-node", "2", "x.py", "lr=1e-3", "trainer.devices=2", "--pin-memory", "true"],
        ["python", "-c", "import torch; x = torch.ones(2, device='cuda:1'); print(x == 1)"],
        ["x", "--url", "http://host:8000/v1?n=1", "--pass-through", "a", "--auth-type", "none", "--key-frames", "3"],
    ],
)
def test_what_is_no_secret_stays(words: list[str]) -> None:
    assert redact_command(words) == " ".join(words)


def test_a_very_long_command_line_is_cut() -> None:
    shown = redact_command(["python", "a" * 10**6, *["b"] * 10**5])
    assert len(shown) < LONGEST + 10
    assert shown.endswith("...")


WORDS = st.text(alphabet=string.printable, max_size=30)


@given(WORDS, WORDS, st.sampled_from([*NAMES, *VARIABLES]), st.text(string.ascii_letters + string.digits, min_size=12))
def test_no_text_around_a_secret_uncovers_it(before: str, after: str, name: str, value: str) -> None:
    value = f"Zq{value}qZ"
    shown = redact_command([before, f"--{name}={value}", after, json.dumps({name: value})])
    assert value not in shown


def test_no_pattern_backtracks_for_ever() -> None:
    for part in ("a", "a=", "=: ", "eyJ", "-", "http://", "a.", "bearer ", '"', "a'", "-----BEGIN PRIVATE KEY-----"):
        assert len(redact_command([part * LONGEST])) <= 2 * LONGEST
