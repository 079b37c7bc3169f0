"""Redaction of secrets in command lines and settings."""

from __future__ import annotations

import json
import re
import shlex
import string
from typing import Any

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


DASHED = "--S3cr3t/x+y_z"


@pytest.mark.parametrize(
    "words",
    [
        ["--token", DASHED],
        ["--token", f"{DASHED}=Q"],
        ["--token", f"-{DASHED}"],
        ["--password", "--hunter2-S3cr3t"],
        ["-token", DASHED],
        ["/token", DASHED],
        ["--token=", DASHED],
        ["--token", "=", DASHED],
        ["token:", DASHED],
        ["--token", "--", "S3cr3t"],
        ["--token", "--password", DASHED],
        ["--token", "--password", "S3cr3t"],
        ["--token", "Bearer", DASHED],
        ["--header", "Authorization:", DASHED],
        ["--header", "Authorization:", "Bearer", DASHED],
        ["HF_TOKEN", DASHED],
        ["sh", "-c", f"x --token {DASHED}"],
        ["sh", "-c", f"x --token \\\n {DASHED}"],
        ["sh", "-c", f"x --token --password {DASHED}"],
        ["sh", "-c", f"x --token Bearer {DASHED}"],
        ["sh", "-c", "x --token -- S3cr3t"],
        ["sh", "-c", f"x HF_TOKEN {DASHED}"],
        ["sh", "-c", f"x HF_TOKEN {DASHED[1:]}"],
    ],
)
def test_a_value_that_begins_with_dashes_is_redacted(words: list[str]) -> None:
    for arguments in (["x", *words], ["x", *words, "--port=8000"]):
        shown = redact_command(arguments)
        assert "S3cr3t" not in shown
        assert "***" in shown
        assert shown.endswith("--port=8000") == (arguments[-1] == "--port=8000")


def test_an_option_after_the_value_of_a_secret_one_stays() -> None:
    for words in (["--token", DASHED, "--port", "8000"], ["sh", "-c", f"x --token {DASHED} --port 8000"]):
        assert redact_command(words).endswith("--token *** --port 8000")


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
        ["pip", "install", "git+https://github.com/a/b@v1", "--index-url", "https://host/simple", "a@b.org"],
        ["python", "-u", "x.py", "--user", "me", "-p", "8000", "--num-tokens", "7", "max_new_tokens=8", "author=me"],
        ["torchrun", "--rdzv-endpoint", "host:29500", "-m", "pkg.train", "--monkey", "a", "--pattern", "*.py", "b"],
        ["sh", "-c", "python train.py --signal 9 && echo 'it is done' > out.txt"],
        ["python", "-c", "import json; print({'port': [1, 2], 'device': 'cuda:1'})"],
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
    for part in (
        "a",
        "a=",
        "=: ",
        "eyJ",
        "-",
        "http://",
        "a.",
        "bearer ",
        '"',
        "a'",
        "-----BEGIN PRIVATE KEY-----",
        "key=",
        "key={",
        'key="',
        'key=\\"',
        "--key ",
        "key: [",
        "key ",
        "http://a:",
        "-u a:",
        "key=(",
        "sshpass -p ",
        "a_b ",
    ):
        assert len(redact_command([part * LONGEST])) <= 2 * LONGEST


VALUE = "q7Zk9wYx2"  # Its form shows nothing.
LEAKS = """
vllm serve m --api-key VALUE VALUE2 VALUE3
x --api-key= VALUE
x --api-key : VALUE
x --api-key=[VALUE,VALUE2]
x --token -VALUE
x --token:VALUE
x --token =VALUE
x token = VALUE
x token := VALUE
x HF_TOKEN VALUE
x -e HF_TOKEN VALUE
x --env API_KEY=VALUE
x user.password VALUE
x aws_secret_access_key VALUE
x 'api-key VALUE'
x --jwt VALUE
x --pat VALUE
x --pin VALUE
x --signature VALUE
x --sas-token VALUE
x --tokens VALUE,VALUE2
x --api-tokens VALUE
x --hf-token-value VALUE
x --OPENAI_API_KEY_1 VALUE
x --ssh-key VALUE
x --auth=basic VALUE
x --login user=u password=VALUE
x -DdbPassword=VALUE
x /p:Password=VALUE
x --set a=1,auth.password=VALUE,b=1
x --encoding api%5Fkey=VALUE
x --key=\\nVALUE
x 'password=two VALUE'
x --api-key='two VALUE words'
x --password=''VALUE
x 'export TOKEN=""VALUE'
x "export TOKEN='a''VALUE'"
x 'export TOKEN="a"VALUE"b"'
x 'password=a"VALUE"'
x 'password = "a\\"VALUE"'
x 'password = "a\\\\"VALUE"'
x 'token := VALUE'
x 'token==VALUE'
x 'token=>VALUE'
x 'token: !!str VALUE'
x 'token\\n=\\nVALUE'
x 'Server=s;Pwd=a;VALUE;'
x 'AccountKey=VALUE==;EndpointSuffix=c'
x "{'token':\\n 'VALUE'}"
x "['--api-key', 'VALUE']"
x 'os.environ.setdefault("HF_TOKEN", "VALUE")'
x "setdefault('HF_TOKEN','VALUE')"
x 'setenv("API_KEY","VALUE",1)'
x 'os.putenv("API_KEY", "VALUE")'
x 'set_key(".env", "API_KEY", "VALUE")'
x 'auth=("password", "VALUE")'
x 'f(password=decode("VALUE"))'
x 'f(x, password=a["VALUE"], y=2)'
x 'print("{\\"password\\":\\"VALUE\\"}")'
x 'print("{\\"password\\": \\"a\\\\\\"VALUE\\"}")'
x '{"password": {"v": "VALUE"}}'
x '{"password": {"v": ["}", "VALUE"]}, "port": 1}'
x '{"tokens": ["aa", "VALUE"]}'
x '{"api_keys": [{"a": "x"}, {"b": "VALUE"}]}'
x '{"password": {"v": "VALUE'
x 'tokens: [a, VALUE]'
x '{api_key: "VALUE"}'
x 'api_keys=["a", "VALUE"]'
x --credentials '{"a": "VALUE"}'
x -H 'Cookie: session=VALUE; b=VALUE'
x -H 'Authorization: ApiKey VALUE'
x -H 'Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature=VALUE'
x -H 'Proxy-Authorization: Custom a b VALUE'
x --header 'X-API-Key: VALUE'
x -H Authorization: ApiKey VALUE
sh -c 'curl -H "Cookie: session=VALUE; b=VALUE" http://host'
sh -c 'curl -H "Authorization: ApiKey VALUE" http://host'
sh -c 'vllm serve --api-key VALUE VALUE2 --port 1'
sh -c 'curl -u me:VALUE http://host'
curl -u me:VALUE http://host
curl -ume:VALUE http://host
curl --user me:VALUE http://host
curl --proxy-user=me:VALUE http://host
sshpass -p VALUE ssh host
sshpass -pVALUE ssh host
x https://VALUE:x-oauth-basic@host/x.git
x https://me:VALUE@host
x git+https://x:VALUE@host
x https://me:pa/VALUE@host/x
x https://me:a@VALUE@host/x
x postgres://me:p#VALUE@host/x
x postgres://me:p?VALUE@host/x
x https:\\\\/\\\\/me:VALUE@host
x https://b.host/k?X-Amz-Signature=VALUE&X-Amz-Credential=VALUE&X-Amz-Security-Token=VALUE
x https://a.host/c?sv=1&sig=VALUE
x http://h/?token=VALUE;x=1
x http://h/#access_token=VALUE
"""


@pytest.mark.parametrize("line", LEAKS.strip().splitlines())
def test_no_form_of_a_secret_is_shown(line: str) -> None:
    words = shlex.split(line.replace("\\n", "\n"))
    assert "VALUE" in " ".join(words)
    for parts in (words, [words[0], " ".join(words[1:])]):
        shown = redact_command([part.replace("VALUE", VALUE) for part in parts])
        assert VALUE not in shown
        assert "***" in shown


@given(
    st.sampled_from(["api_key", "HF_TOKEN", "password", "client-secret"]),
    st.recursive(
        st.just(VALUE) | st.text(string.printable, max_size=6).map(lambda text: text + VALUE),
        lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=4), inner, min_size=1),
        max_leaves=5,
    ),
    st.integers(0, 3),
)
def test_no_value_of_a_secret_name_is_shown_however_deep_or_often_escaped(name: str, value: Any, times: int) -> None:
    text = json.dumps({"port": 1, name: value})
    for _ in range(times):
        text = json.dumps(text)
    assert VALUE not in redact(text)
    assert VALUE not in redact_command(["x", "-c", f"f({text})"])


@given(st.lists(st.sampled_from(["'", '"', "\\", "[", "{", "]", "}", "=", ":", " ", "\n", "a", "key", "--token", "@"])))
def test_redaction_of_any_text_ends(parts: list[str]) -> None:
    assert isinstance(redact("".join(parts)), str)
