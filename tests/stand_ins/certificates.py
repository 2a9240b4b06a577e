"""Certificates and keys of a federation, right and wrong ones, made in an instant."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_ISSUER, _SERVER = (
    x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    for name in ("a federation", "its server")
)


def write_certificates(
    folder: Path, *, hosts: tuple[str, ...] = ("localhost",), begins: int = -1, ends: int = 10
) -> Path:
    """Write ca.crt, server.crt and server.key; `begins` and `ends` are days from now."""
    folder.mkdir(parents=True)
    ca_key, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _begun(_ISSUER, ca_key, -100, 100)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(identifier, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    names = [x509.IPAddress(ip_address("127.0.0.1")), *map(x509.DNSName, hosts)]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    server = (
        _begun(_SERVER, key, begins, ends)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    for name, certificate in (("ca.crt", ca), ("server.crt", server)):
        (folder / name).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(_private(key, serialization.PrivateFormat.PKCS8))
    return folder


def write_node_key(file: Path) -> Path:
    """Write a private key, and beside it the public one, as ssh-keygen does."""
    key = ec.generate_private_key(ec.SECP384R1())
    file.write_bytes(_private(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    file.with_name(f"{file.name}.pub").write_bytes(public)
    return file


def _begun(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, begins: int, ends: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_ISSUER)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=begins))
        .not_valid_after(now + timedelta(days=ends))
    )


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
