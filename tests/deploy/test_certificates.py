"""A certificate authority of one's own: what it signs, for whom, how long, and who can read it."""

import datetime
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

if shutil.which("openssl") is None:
    pytest.skip("openssl is not installed", allow_module_level=True)
x509 = pytest.importorskip("cryptography.x509", reason="cryptography comes with flwr")

NAMES = ("fed.example.org", "10.0.0.5", "fe80::1", "localhost")
SCRIPT = "make-certificates.sh"
ScriptRun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_script: ScriptRun) -> Path:
    """What the script makes for a server with a name and two addresses."""
    made = tmp_path_factory.mktemp("a folder") / "certificates"
    result = run_script(SCRIPT, made, *NAMES, DAYS="30")
    assert result.returncode == 0, result.stderr
    assert "valid for 30 days" in result.stdout
    return made


def read(file: Path) -> "x509.Certificate":
    return x509.load_pem_x509_certificate(file.read_bytes())


def shake_hands(folder: Path, trusted: Path, *, name: str) -> str | None:
    """A node calls the server by `name`; why it hangs up, or None."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 does by itself
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=name).close()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    finally:
        ours.close()
        thread.join()
    return None


@pytest.mark.parametrize("name", [*NAMES, "127.0.0.1", "::1"])
def test_a_node_with_the_authoritys_certificate_trusts_the_server(folder: Path, name: str) -> None:
    assert shake_hands(folder, folder / "ca.crt", name=name) is None


def test_a_node_that_calls_another_name_hangs_up(folder: Path) -> None:
    problem = shake_hands(folder, folder / "ca.crt", name="other.example.org")
    assert problem == "Hostname mismatch, certificate is not valid for 'other.example.org'."


def test_a_node_of_another_authority_hangs_up(
    folder: Path, tmp_path: Path, run_script: ScriptRun
) -> None:
    run_script(SCRIPT, tmp_path / "other", "localhost")
    problem = shake_hands(folder, tmp_path / "other" / "ca.crt", name="localhost")
    assert problem is not None
    assert "unable to get" in problem or "signature failure" in problem


def test_the_certificate_names_the_server_and_ends_when_it_was_asked_to(folder: Path) -> None:
    server, authority = read(folder / "server.crt"), read(folder / "ca.crt")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    addresses = ["127.0.0.1", "::1", "10.0.0.5", "fe80::1"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address(each) for each in addresses]
    assert server.not_valid_after_utc - server.not_valid_before_utc == datetime.timedelta(days=30)
    assert authority.not_valid_after_utc > server.not_valid_after_utc


def test_the_server_cannot_sign_for_others(folder: Path) -> None:
    constraints = x509.BasicConstraints
    for name, is_authority in (("server.crt", False), ("ca.crt", True)):
        found = read(folder / name).extensions.get_extension_for_class(constraints)
        assert (found.critical, found.value.ca) == (True, is_authority)


def test_keys_are_for_their_owner_alone_and_nothing_is_left_over(folder: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == {"ca.key": 0o600, "server.key": 0o600, "ca.crt": 0o644, "server.crt": 0o644}


def test_nothing_is_overwritten_and_a_renewal_has_the_same_authority(
    folder: Path, tmp_path: Path, run_script: ScriptRun
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    refused = run_script(SCRIPT, copy, "localhost")
    assert refused.returncode == 1
    assert "server.crt exists; move it away to make a new one" in refused.stderr
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before

    (copy / "server.crt").unlink()
    (copy / "server.key").unlink()
    assert run_script(SCRIPT, copy, "new.example.org").returncode == 0
    assert shake_hands(copy, folder / "ca.crt", name="new.example.org") is None
    assert (copy / "ca.key").read_bytes() == before["ca.key"]


@pytest.mark.parametrize(
    ("arguments", "days", "message"),
    [
        pytest.param([], "1", "give a folder and the server's host names", id="no-folder"),
        pytest.param(["x"], "1", "got 1 arguments", id="no-name"),
        pytest.param(["x", "a"], "0", "DAYS is '0'; give a whole number of days", id="no-days"),
        pytest.param(["x", "a"], "-5", "DAYS is '-5'", id="days-before"),
        pytest.param(["x", "a,DNS:b"], "1", "'a,DNS:b' is no host name", id="smuggled-name"),
        pytest.param(["x", "a:9092"], "1", "'a:9092' has a port", id="port"),
        pytest.param(["x", "1.2.3"], "1", "openssl refused: .*IP:1.2.3", id="half-an-address"),
        pytest.param(["x", "--help"], "1", "'--help' is no host name", id="option"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_key(
    tmp_path: Path, run_script: ScriptRun, arguments: list[str], days: str, message: str
) -> None:
    folder = [tmp_path / "new"] if arguments else []
    result = run_script(SCRIPT, *folder, *arguments[1:], DAYS=days)
    assert result.returncode == 1
    assert re.search(message, result.stderr)
    assert not list(tmp_path.rglob("*.*"))


def test_half_an_authority_is_refused(tmp_path: Path, run_script: ScriptRun) -> None:
    (tmp_path / "ca.crt").write_text("")
    result = run_script(SCRIPT, tmp_path, "localhost")
    assert result.returncode == 1
    assert "only one is in" in result.stderr
