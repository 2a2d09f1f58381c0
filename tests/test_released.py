import errno
import hashlib
import http.server
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from convert import released
from convert.errors import UserError
from convert.pixels import CAFFE_PIXELS
from convert.released import Checksum, Release, fetch, find, locate, names, place

CONTENT = bytes(range(256)) * 12_000  # about 3 MB


class Server(http.server.ThreadingHTTPServer):
    """Serves one file on loopback, and can be told to behave badly.

    Attributes:
        content: the file.
        ranges: whether it knows HTTP's Range.
        cuts: after how many bytes of an answer it hangs up, a number an answer.
        refusals: statuses that it answers first, one a request.
        kind: the Content-Type.
        asked: the Range of every request, None where there was none.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.cuts = CONTENT, True, []
        self.refusals, self.kind, self.asked = [], "application/octet-stream", []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        span = self.headers.get("Range")
        server.asked.append(span)
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
        total = len(server.content)
        refusal = server.refusals.pop(0) if server.refusals else 416 if start >= total else 0
        if refusal:
            self.send_error(refusal)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else total
        self.wfile.write(server.content[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MOCO_TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(released, "TIMEOUT_S", 10.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def release_at(server, **changes):
    digest = hashlib.sha256(server.content).hexdigest()
    address = f"http://127.0.0.1:{server.server_port}/folder/weights.pth"
    return replace(Release("ours", address, Checksum("sha256", digest), "MoCo v1"), **changes)


def left(release):
    """What stands in the cache, locks aside."""
    folder = place(release).parent
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def refusal(release):
    with pytest.raises(UserError) as caught:
        fetch(release, quiet=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_release_is_fetched_whole_and_only_once(server):
    release = release_at(server)
    path = fetch(release, quiet=True)
    assert path == place(release)
    assert path.read_bytes() == CONTENT
    assert left(release) == ["weights.pth"]
    assert fetch(release, quiet=True) == path
    assert server.asked == [None]


def test_a_download_goes_on_where_the_connection_broke(server):
    server.cuts = [1_000_000, 700_000]
    assert fetch(release_at(server), quiet=True).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=1700000-"]


def test_a_later_run_goes_on_where_an_earlier_one_ended(server, monkeypatch):
    release = release_at(server)
    server.cuts = [1_000_000]
    monkeypatch.setattr(released, "ATTEMPTS", 1)
    assert "what came is kept to go on from" in refusal(release)
    assert fetch(release, quiet=True).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]
    assert left(release) == ["weights.pth"]


def test_a_server_without_ranges_is_asked_from_the_beginning(server):
    server.ranges, server.cuts = False, [1_000_000]
    release = release_at(server)
    assert fetch(release, quiet=True).read_bytes() == CONTENT
    assert len(server.asked) == 2
    assert left(release) == ["weights.pth"]


@pytest.mark.parametrize("longer", [True, False])
def test_a_file_of_another_size_is_begun_anew(server, monkeypatch, longer):
    server.cuts = [1_000_000]
    with monkeypatch.context() as patch:
        patch.setattr(released, "ATTEMPTS", 1)
        refusal(release_at(server))
    server.content = CONTENT[::-1] + b"more" if longer else CONTENT[:500_000]
    release = release_at(server)
    assert fetch(release, quiet=True).read_bytes() == server.content
    assert left(release) == ["weights.pth"]


def test_a_wrong_checksum_is_refused_and_nothing_stays(server):
    release = release_at(server, checksum=Checksum("md5", "0123abcd"))
    line = refusal(release)
    assert hashlib.md5(CONTENT).hexdigest() in line
    assert "want 0123abcd" in line
    assert left(release) == []


def test_the_beginning_of_a_checksum_is_enough(server):
    beginning = hashlib.md5(CONTENT).hexdigest()[:8]
    assert fetch(release_at(server, checksum=Checksum("md5", beginning)), quiet=True).is_file()


def test_a_file_put_into_the_cache_by_hand_is_used_unasked(server):
    release = release_at(server)
    place(release).parent.mkdir(parents=True)
    place(release).write_bytes(CONTENT)
    assert fetch(release, quiet=True) == place(release)
    assert server.asked == []


def test_a_wrong_file_put_there_by_hand_is_refused_and_kept(server):
    release = release_at(server)
    place(release).parent.mkdir(parents=True)
    place(release).write_bytes(b"something else")
    assert "take it away to have it fetched" in refusal(release)
    assert place(release).read_bytes() == b"something else"


def test_what_is_not_there_is_said_with_the_address_and_asked_for_once(server):
    server.refusals = [404]
    release = release_at(server)
    line = refusal(release)
    assert "404" in line
    assert release.address in line
    assert str(place(release)) in line
    assert len(server.asked) == 1
    assert left(release) == []


def test_a_server_in_trouble_is_asked_again(server):
    server.refusals = [503, 503]
    assert fetch(release_at(server), quiet=True).read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_offline_it_says_where_the_file_may_be_put(server):
    release = release_at(server, address="http://127.0.0.1:9/weights.pth")  # nobody listens there
    line = refusal(release)
    assert "is this machine offline?" in line
    assert line.endswith(f"put the file at {place(release)}, where it is found")
    assert left(release) == []


@pytest.mark.parametrize("said", [True, False])
def test_a_web_page_is_no_checkpoint_and_costs_no_part(server, monkeypatch, said):
    release = release_at(server)
    server.cuts = [1_000_000]
    with monkeypatch.context() as patch:
        patch.setattr(released, "ATTEMPTS", 1)
        refusal(release)
    before = left(release)
    server.ranges = False
    server.content = b"Please sign in" if said else b"<!DOCTYPE html><p>Please sign in"
    server.kind = "text/html; charset=utf-8" if said else "application/octet-stream"
    assert "is a web page" in refusal(release)
    assert left(release) == before == [f"weights.pth.{len(CONTENT)}.part"]


def test_a_full_disk_is_one_line_and_leaves_nothing_on_it(server, monkeypatch):
    real = Path.open

    def full(path, mode="r", *rest, **options):
        file = real(path, mode, *rest, **options)
        if path.suffix == ".part":
            file.write(b"some of it")

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, _):
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full()
        return file

    monkeypatch.setattr(Path, "open", full)
    release = release_at(server)
    assert "the disk is full" in refusal(release)
    assert left(release) == []


def test_two_at_once_fetch_it_once(server):
    release = release_at(server)
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(release))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [place(release)] * 4
    assert server.asked == [None]


def test_a_bar_or_lines_show_how_far_it_is(server, capsys):
    fetch(release_at(server))
    assert "fetching ours: 3/3 megabytes" in capsys.readouterr().err


def write_network(path, arch):
    torch.manual_seed(0)
    torch.save(getattr(torchvision.models, arch)().state_dict(), path)
    return path.read_bytes()


def test_without_a_published_checksum_only_a_whole_backbone_is_taken(server, tmp_path, capsys):
    server.content = write_network(tmp_path / "r18.pth", "resnet18")
    release = release_at(server, checksum=None, arch="resnet18", pixels=CAFFE_PIXELS)
    path = fetch(release)
    digest = hashlib.sha256(server.content).hexdigest()
    assert f"sha256, {digest}, is noted" in capsys.readouterr().err
    assert left(release) == ["weights.pth", "weights.pth.sha256"]
    path.unlink()
    server.content = server.content + b"x"  # changed since: no longer what was first trusted
    assert digest in refusal(release)
    assert left(release) == ["weights.pth.sha256"]


@pytest.mark.parametrize("content", [CONTENT, None], ids=["no checkpoint", "another network"])
def test_without_a_published_checksum_anything_else_is_refused(server, tmp_path, content):
    server.content = content or write_network(tmp_path / "r18.pth", "resnet18")
    release = release_at(server, checksum=None)
    refusal(release)
    assert left(release) == []


def test_without_a_published_checksum_no_half_is_gone_on_from(server):
    server.cuts = [1_000_000]
    refusal(release_at(server, checksum=None))
    assert server.asked == [None, None]


def test_every_name_finds_its_release():
    assert len(names()) == len(set(names())) == 6
    assert all(find(name).name == name for name in names())
    assert find("moco_v2_80ep") is None


def test_a_name_means_its_file_and_a_file_of_that_name_itself(server, monkeypatch, tmp_path):
    release = release_at(server)
    monkeypatch.setattr(released, "RELEASES", (release,))
    monkeypatch.chdir(tmp_path)
    assert locate("ours", quiet=True) == place(release)
    Path("ours").write_bytes(b"mine")
    assert locate("ours").read_bytes() == b"mine"
    assert locate("missing.pth") == Path("missing.pth")


def test_a_word_that_is_nearly_a_name_is_refused_with_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file.* near it: moco_v2_800ep"):
        locate("moco_v2_80ep")


def test_no_two_releases_share_a_place(server):
    assert len({place(find(name)) for name in names()}) == len(names())


def test_published_facts_are_those_of_the_papers_and_of_torchvision():
    weights = torchvision.models.ResNet50_Weights
    for name, entry in (
        ("torchvision_resnet50_v1", weights.IMAGENET1K_V1),
        ("torchvision_resnet50_v2", weights.IMAGENET1K_V2),
    ):
        release = find(name)
        assert release.address == entry.url
        beginning = re.search(r"-([0-9a-f]{8})\.pth$", entry.url)[1]
        assert release.checksum.algorithm == "sha256"
        assert release.checksum.digest.startswith(beginning)
        assert release.published[0].value == entry.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    top1 = {name: find(name).published[0].value for name in names() if name.startswith("moco")}
    assert top1 == {"moco_v1_200ep": 60.6, "moco_v2_200ep": 67.7, "moco_v2_800ep": 71.1}
    for name, beginning in (
        ("moco_v1_200ep", "b251726a"),
        ("moco_v2_200ep", "59fd9945"),
        ("moco_v2_800ep", "a04e12f8"),
    ):
        assert find(name).checksum.algorithm == "md5"
        assert find(name).checksum.digest.startswith(beginning)


def test_checksums_are_whole_or_absent():
    for checksum in filter(None, (find(name).checksum for name in names())):
        assert len(checksum.digest) == 2 * hashlib.new(checksum.algorithm).digest_size
        assert int(checksum.digest, 16)


def test_only_msras_is_bgr_with_its_stride_in_the_first_convolution():
    others = [find(name) for name in names() if name != "msra_resnet50"]
    assert {r.pixels.channel_order for r in others} == {"RGB"}
    assert not any(r.stride_in_1x1 for r in others)
    msra = find("msra_resnet50")
    assert msra.stride_in_1x1
    assert msra.pixels.detectron2() == {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    }
