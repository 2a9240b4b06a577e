from itertools import combinations
from pathlib import Path

import pytest

from fedsafe.federated.run_files import client_folder


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ada", "0003-ada"),
        ("../../evil", "0003-....evil"),
        ("b/c", "0003-bc"),
        ("..", "0003-.."),
        ("", "0003"),
        ("/", "0003"),
        ("Zoë Ω\n", "0003-Zo"),
        ("x" * 500, "0003-" + "x" * 64),
    ],
)
def test_a_client_has_a_folder_inside_its_parent(name: str, folder: str, tmp_path: Path) -> None:
    assert client_folder(3, name) == folder
    assert (tmp_path / folder).resolve().parent == tmp_path.resolve()
    (tmp_path / folder).mkdir()


def test_no_two_clients_share_a_folder() -> None:
    clients = enumerate(["a/b", "ab", "", "/", "AB", "3-a", "a"])
    folders = [client_folder(client, name).lower() for client, name in clients]
    assert all(one != other for one, other in combinations(folders, 2))
