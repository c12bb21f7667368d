"""A front door before a stand-in for a SuperLink, and a client at it."""

import threading

import httpx
import pytest
from doors import HERE, Fake, trusting

from fedsim.deploy import front_door as fd
from fedsim.deploy.authority import make
from fedsim.deploy.certificates import server_files


@pytest.fixture
def upstream():
    fake = Fake()
    thread = threading.Thread(target=fake.serve_forever, args=(0.02,))
    thread.start()
    fake.url = f"http://127.0.0.1:{fake.server_port}"
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    make(folder, ["127.0.0.1"], 2)
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def door(upstream, certs, said):
    with fd.front_door(HERE, upstream.url, server_files(certs), said.append, known={b"known"}) as door:
        yield door


@pytest.fixture
def client(door, certs):
    with httpx.Client(base_url=f"https://{door.address}", verify=trusting(certs / "ca.crt"), trust_env=False) as client:
        yield client
