import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.deploy.address import Address, is_ip
from fedsim.errors import ConfigError

NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]([a-z0-9-]{0,5}[a-z0-9])?){0,3}", fullmatch=True)
HOSTS = st.one_of(NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))


@given(HOSTS, st.integers(0, 65535))
def test_what_is_printed_is_read_again(host, port):
    address = Address(host, port)
    assert Address.parse(str(address), "--listen") == address


@given(st.text())
def test_anything_else_is_a_config_error(text):
    try:
        found = Address.parse(text, "--server")
    except ConfigError as error:
        assert str(error).startswith("--server: ")
    else:
        assert Address.parse(str(found), "") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:65536",
        "host:70000",
        "host:-1",
        "host:8 ",
        "ho st:80",
        "::1:80",
        "[::1]",
        "[host]:80",
        "-a:1",
        "http://host:80",
        "host:80/path",
        "256.1.1.1:80",
        "1.2.3:80",
        "[1.2.3.4]:80",
        "a..b:80",
        "host:٣",
        "[fe80::1%a]:1",
    ],
)
def test_no_address(text):
    with pytest.raises(ConfigError):
        Address.parse(text, "--listen")


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("localhost:1", True),
        ("LocalHost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_loopback(text, loopback):
    assert Address.parse(text, "").is_loopback is loopback


def test_ip():
    assert is_ip("::1") and is_ip("10.0.0.1") and not is_ip("localhost")
