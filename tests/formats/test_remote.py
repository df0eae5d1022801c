"""Files on the web, from a server on this machine: ranges, cache, faults, secrets."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plymix
from plymix import cli, replay, urls
from plymix.errors import Cancelled, Failure, FormatError, PlymixError, Refusal
from plymix.formats import open_handle, open_model, remote, web
from server import serving
from small import draw, load, recipe, save
from tiny import write

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(web, "PAUSE", 0.002)


@pytest.fixture
def site():
    with serving() as (files, address):
        files.address = address
        yield files


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8).tobytes()


def read(address, begin=0, end=None):
    """Bytes [begin, end) of a file on the web."""
    handle = open_handle(urls.path(address))
    try:
        out = bytearray((handle.size if end is None else end) - begin)
        handle.read_at(begin, out)
        return bytes(out)
    finally:
        handle.close()


def fault(site, *answers):
    """The server gives these answers first: (status, headers), or a function."""
    left = list(answers)

    def act(handler, path):
        if not left:
            return False
        answer = left.pop(0)
        if callable(answer):
            return answer(handler, path)
        status, headers = answer
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    site.faults[:] = [act]


def fetched(site):
    """Bytes of the files that were sent."""
    return sum(last + 1 - first for _, first, last in site.log)


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "shown", "asked"),
    [
        ("https://h/a.ckpt", "https://h/a.ckpt", "https://h/a.ckpt"),
        ("https:/h/a.ckpt", "https://h/a.ckpt", "https://h/a.ckpt"),
        ("https:\\h\\d\\a.ckpt", "https://h/d/a.ckpt", "https://h/d/a.ckpt"),
        ("HTTPS://h:8443/a#part", "https://h:8443/a", "https://h:8443/a"),
        ("https://me:pw@h/a", "https://h/a", "https://me:pw@h/a"),
        ("https://h/a?type=Model&token=x", "https://h/a?type=Model", "https://h/a?type=Model&token=x"),
        ("https://h/a?X-Amz-Signature=x", "https://h/a", "https://h/a?X-Amz-Signature=x"),
        ("hf://o/r/a.ckpt", "hf://o/r/a.ckpt", "https://huggingface.co/o/r/resolve/main/a.ckpt"),
        ("hf://o/r/d/a@v1", "hf://o/r@v1/d/a", "https://huggingface.co/o/r/resolve/v1/d/a"),
        ("hf://o/r@v1/d/a", "hf://o/r@v1/d/a", "https://huggingface.co/o/r/resolve/v1/d/a"),
        (
            "hf://o/r/a@refs/pr/1",
            "hf://o/r@refs%2Fpr%2F1/a",
            "https://huggingface.co/o/r/resolve/refs%2Fpr%2F1/a",
        ),
        ("models/a.ckpt", "models/a.ckpt", "models/a.ckpt"),
        ("C:\\models\\a.ckpt", "C:\\models\\a.ckpt", "C:\\models\\a.ckpt"),
        ("https", "https", "https"),
    ],
)  # fmt: skip
def test_addresses(said, shown, asked):
    assert urls.public(said) == shown
    assert urls.public(shown) == shown
    assert urls.full(shown) == asked
    if urls.is_url(said):
        assert urls.full(urls.path(said)) == asked
        assert urls.text(urls.path(said)) == shown


@pytest.mark.parametrize(
    "said",
    ["hf://o/r", "hf://o", "hf://o/r/", "hf://o/r/../x", "https://h:x/a", "http://h/a b",
     "https://[/a", "https://h/\x00"],
)  # fmt: skip
def test_what_is_no_address_is_refused(said):
    with pytest.raises(Refusal):
        open_model(said)


def test_names():
    assert urls.name("https://h/d/a%20b.ckpt?token=x") == "a b.ckpt"
    assert urls.name("hf://o/r/d/a.ckpt@main") == "a.ckpt"
    assert urls.name("d/a.ckpt") == "a.ckpt"
    assert plymix.two_models("x", "hf://o/r/d/b.ckpt@v1").models["b"].file == "hf://o/r@v1/d/b.ckpt"


# --- merges -------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, site):
    files = [write(tmp_path / f"{n}.safetensors", "sd1", i) for i, n in enumerate("ab")]
    site.files["/dir/b.safetensors"] = files[1].read_bytes()
    return files[0], files[1], f"{site.address}/dir/b.safetensors"


def test_a_merge_is_that_of_the_file_itself(tmp_path, models):
    a, b, there = models
    plymix.merge(a, b, tmp_path / "local.safetensors", alpha="GRAD_V")
    plymix.merge(a, there, tmp_path / "remote.safetensors", alpha="GRAD_V")
    local, said = (load(tmp_path / f"{n}.safetensors") for n in ("local", "remote"))
    assert local[0].keys() == said[0].keys()
    for key, (dtype, x) in local[0].items():
        assert said[0][key][0] == dtype
        np.testing.assert_array_equal(said[0][key][1], x)
    ours, theirs = (json.loads(m["plymix.recipe"])["models"] for m in (local[1], said[1]))
    assert theirs["b"] == {**ours["b"], "file": there}
    assert local[1]["sd_merge_recipe"] == said[1]["sd_merge_recipe"]


def test_replay_fetches_it_again(tmp_path, models, site):
    a, b, there = models
    b.unlink()
    home = tmp_path / "home"
    home.mkdir()
    plymix.merge(a, there, home / "o.safetensors")
    a.rename(home / a.name)
    again = tmp_path / "again.safetensors"
    replay.replay(home / "o.safetensors", again)
    assert again.read_bytes() == (home / "o.safetensors").read_bytes()
    assert replay.verify(home / "o.safetensors").ok
    site.files["/dir/b.safetensors"] = site.files["/dir/b.safetensors"][:-1] + b"?"
    site.etags["/dir/b.safetensors"] = "2"
    with pytest.raises(Refusal, match=r"is not the http.*other content"):
        replay.replay(home / "o.safetensors", tmp_path / "third.safetensors")
    site.files.clear()
    with pytest.raises(Refusal, match="404"):
        replay.replay(home / "o.safetensors", tmp_path / "third.safetensors")


def test_no_secret_is_shown_or_kept(tmp_path, models, site, monkeypatch, capsys):
    a, _, there = models
    monkeypatch.setenv("HF_TOKEN", "HUSH3")
    monkeypatch.chdir(tmp_path)
    secret = there.replace("//", "//me:HUSH1@") + "?token=HUSH2&type=Model"

    def run(*words):
        code = cli.run([str(word) for word in words])
        shown = capsys.readouterr()
        said.append(shown.out + shown.err)
        return code

    said = []
    assert run("merge", a, secret, "-o", "o.safetensors") == 0
    assert site.requests[0][1]["Authorization"] == "Basic bWU6SFVTSDE="
    assert site.requests[0][0].endswith("token=HUSH2&type=Model")
    Path("r.toml").write_text(
        f'[models]\na = "{a}"\nb = "{secret}"\n[steps.mix]\nmethod = "weighted_sum"\n'
        'a = "a"\nb = "b"\n[output]\nvae = "b"\n'
    )
    assert run("run", "r.toml", "-o", "p.safetensors") == 0
    assert run("inspect", secret, "--json") == 0
    assert run("explain", a, secret) == 0
    assert run("mbw", a, secret, "--base_alpha", "0.5", "--weights", ",".join(["0.5"] * 25)) == 0
    assert run("recipe", "show", "o.safetensors") == 0
    assert run("check", secret) == 0
    assert run("diff", a, secret) == 0
    site.files["/dir/b.safetensors"] = b"damaged"
    site.etags["/dir/b.safetensors?token=HUSH2&type=Model"] = "2"
    assert run("check", secret) == 1
    site.files.clear()
    assert run("inspect", secret) == 2
    assert run("merge", a, secret, "-o", "q.safetensors") == 2
    assert "404" in said[-1]
    assert there in said[-1]
    assert "HUSH" not in "".join(said)
    assert not any("HUSH" in headers.get("Authorization", "") for _, headers in site.requests)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "r.toml":
            assert b"HUSH" not in path.read_bytes(), path


def test_a_vae_from_the_web(tmp_path, models, site):
    a, b, there = models
    for n, vae in enumerate((b, there)):
        plymix.merge(a, a, tmp_path / f"{n}.safetensors", vae=str(vae))
    one, two = (load(tmp_path / f"{n}.safetensors")[0] for n in range(2))
    for key in one:
        np.testing.assert_array_equal(one[key][1], two[key][1])


# --- what is fetched ----------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, site):
    """A file of 12 MiB in three tensors, on the web."""
    names = ("first", "second", "third")
    tensors = {n: draw("F32", (MIB,), seed=i) for i, n in enumerate(names)}
    path = save(tmp_path / "large.safetensors", tensors)
    site.files["/large.safetensors"] = path.read_bytes()
    site.path = path
    return f"{site.address}/large.safetensors"


def test_inspect_reads_the_header_only(large, site):
    assert plymix.inspect(large).total.tensors == 3
    assert fetched(site) <= 2 * remote.BLOCK
    assert len(site.requests) <= 2


def test_only_what_a_merge_needs_is_fetched(tmp_path, large, site):
    """Of a model on the Hub, whose SHA-256 the Hub says: one tensor of three has a weight."""
    site.files["/o/r/resolve/main/l.safetensors"] = site.path.read_bytes()
    site.headers["/o/r/resolve/main/l.safetensors"] = {"X-Linked-ETag": '"' + "ab" * 32 + '"'}
    os.environ["HF_ENDPOINT"] = site.address
    try:
        step = recipe({"a": site.path, "b": "hf://o/r/l.safetensors"}, 0.0)
        plymix.merge(with_rule(step, ":second:0.5"), out=tmp_path / "o.safetensors")
    finally:
        del os.environ["HF_ENDPOINT"]
    assert 4 * MIB <= fetched(site) <= 4 * MIB + 5 * remote.BLOCK
    models = json.loads(load(tmp_path / "o.safetensors")[1]["plymix.recipe"])["models"]
    assert models["b"]["sha256"] == "ab" * 32
    assert models["b"]["file"] == "hf://o/r/l.safetensors"


def with_rule(found, rule):
    from plymix.recipe import from_dict, to_dict

    said = to_dict(found)
    said["steps"]["mix"]["rules"] = [rule]
    return from_dict(said)


def test_requests_are_few_where_much_is_needed(tmp_path, large, site):
    plymix.merge(
        recipe({"a": site.path, "b": large}, 0.5), out=tmp_path / "o.safetensors", threads=1
    )
    assert len(site.requests) <= 8  # for 192 blocks of 64 KiB


def test_check_and_hashes_ask_for_much_at_a_time(large, site):
    assert plymix.check(large).ok
    assert len(site.requests) <= 8
    found = plymix.inspect(large, hashes=True).hashes
    assert found == plymix.inspect(site.path, hashes=True).hashes
    assert fetched(site) <= 12 * MIB + 8 * remote.BLOCK


def test_a_second_time_it_comes_from_the_cache(large, site):
    assert read(large) == site.path.read_bytes()
    before = fetched(site)
    assert read(large) == site.path.read_bytes()
    assert fetched(site) - before <= remote.BLOCK  # to know that it is the same file
    with plymix.open(large) as source:
        assert source.path == urls.path(large)


def test_another_process_goes_on_where_one_ended(large, site):
    assert read(large, 0, 5 * MIB) == site.path.read_bytes()[: 5 * MIB]
    before = fetched(site)
    script = (
        "import sys; from plymix import urls; from plymix.formats import open_handle\n"
        "h = open_handle(urls.path(sys.argv[1])); b = bytearray(h.size); h.read_at(0, b)\n"
        "import hashlib; print(hashlib.sha256(b).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script, large], capture_output=True, text=True)
    import hashlib

    assert done.stdout.strip() == hashlib.sha256(site.path.read_bytes()).hexdigest(), done.stderr
    assert fetched(site) - before <= 7 * MIB + 3 * remote.BLOCK


def test_what_is_damaged_in_the_cache_is_fetched_again(tmp_path, large, site):
    read(large)
    (stored,) = (tmp_path / "cache" / "remote").glob("*/data")
    with open(stored, "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"damage")
    before = fetched(site)
    assert read(large) == site.path.read_bytes()
    assert fetched(site) - before <= 2 * remote.BLOCK


def test_the_cache_is_bounded(tmp_path, site, monkeypatch):
    monkeypatch.setenv("PLYMIX_CACHE_LIMIT", "0.005")  # 5 MB
    for i in range(5):
        site.files[f"/{i}"] = noise(2 * MIB, i)
        assert read(f"{site.address}/{i}") == noise(2 * MIB, i)
        if i == 2:
            read(f"{site.address}/1")
    folder = tmp_path / "cache" / "remote"
    used = sum(path.stat().st_blocks * 512 for path in folder.glob("*/data"))
    assert used <= 5e6 + 2 * MIB
    assert len(list(folder.iterdir())) < 5
    monkeypatch.setenv("PLYMIX_CACHE_LIMIT", "much")
    with pytest.raises(Refusal, match="PLYMIX_CACHE_LIMIT"):
        read(f"{site.address}/0")


def test_many_threads_fetch_nothing_twice(large, site):
    want = site.path.read_bytes()
    handle = open_handle(urls.path(large))
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            begin = int(rng.integers(0, len(want) - 300_000))
            out = bytearray(int(rng.integers(1, 300_000)))
            handle.read_at(begin, out)
            if out != want[begin : begin + len(out)]:
                wrong.append(begin)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.close()
    assert not wrong
    assert fetched(site) <= len(want) + remote.BLOCK


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_range_over_a_connection_that_breaks_anywhere(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    size = data.draw(st.integers(1, 400_000))
    want = noise(size, size)
    with pytest.MonkeyPatch.context() as patch, serving() as (site, address):
        patch.setenv("PLYMIX_CACHE", str(folder))
        patch.setattr(web, "PAUSE", 0.0)
        site.files["/f"] = want
        site.cut = data.draw(st.none() | st.integers(70_000, 400_000))
        handle = open_handle(urls.path(f"{address}/f"))
        try:
            for _ in range(3):
                begin = data.draw(st.integers(0, size))
                end = data.draw(st.integers(begin, size))
                if data.draw(st.booleans()):
                    handle.expect([(begin, data.draw(st.integers(begin, size)))])
                out = bytearray(end - begin)
                handle.read_at(begin, out)
                assert out == want[begin:end]
        finally:
            handle.close()


@pytest.mark.parametrize("name", ["m.ckpt", "m.gguf"])
def test_other_formats(tmp_path, site, name):
    path = save(tmp_path / "m.safetensors", {"w": draw("F16", (64, 64)), "b": draw("F16", (3,))})
    plymix.merge(recipe({"a": path, "b": path}), out=tmp_path / name)
    site.files[f"/{name}"] = (tmp_path / name).read_bytes()
    with open_model(f"{site.address}/{name}") as there, open_model(tmp_path / name) as here:
        assert there.tensors == here.tensors
        for info in here.tensors.values():
            assert there.read(info) == here.read(info)


def test_shards_lie_beside_their_index(tmp_path, site):
    tensors = {f"t{i}": draw("F32", (8,), seed=i) for i in range(4)}
    homes = {}
    for i in range(2):
        shard = f"m-0000{i + 1}-of-00002.safetensors"
        mine = {k: v for j, (k, v) in enumerate(tensors.items()) if j % 2 == i}
        site.files[f"/o/r/resolve/v1/d/{shard}"] = save(tmp_path / shard, mine).read_bytes()
        homes |= dict.fromkeys(mine, shard)
    said = json.dumps({"weight_map": homes}).encode()
    site.files["/o/r/resolve/v1/d/m.safetensors.index.json"] = said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", site.address)
        with open_model("hf://o/r/d/m.safetensors.index.json@v1") as source:
            for key, (_, x) in tensors.items():
                assert source.read(source.tensors[key]) == x.tobytes()


def test_a_folder_on_the_web_is_refused(site):
    with pytest.raises(Refusal, match="name one file"):
        open_model(f"{site.address}/model_index.json")


# --- faults -------------------------------------------------------------------------------------


def test_a_dropped_connection_is_taken_up_again(large, site):
    site.cut = 300_000
    assert read(large) == site.path.read_bytes()
    assert len(site.requests) > 12 * MIB // 300_000


def test_a_connection_that_never_gets_anywhere_is_given_up(large, site):
    handle = open_handle(urls.path(large))
    site.cut = 0
    with pytest.raises(Failure, match=r"connection ended early.*6 tries"):
        handle.read_at(MIB, bytearray(10))
    handle.close()


def test_a_slow_server_is_waited_for(large, site):
    site.pause = 0.01
    assert read(large, 0, 2 * MIB) == site.path.read_bytes()[: 2 * MIB]


def test_a_stalled_connection_is_taken_up_again(large, site, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.15)

    def stall(handler, path):
        time.sleep(0.4)
        handler.close_connection = True
        return True

    fault(site, stall)
    assert read(large, 0, MIB) == site.path.read_bytes()[:MIB]


def test_a_stop_does_not_wait_for_a_stalled_server(tmp_path, large, site):
    release = threading.Event()
    source = plymix.open(large)
    info = source.tensors["second"]
    source.read_at(0, MIB, bytearray(MIB))  # what planning and the short hash need

    def stall(handler, path):
        return int(handler.headers["Range"][6:].split("-")[0]) >= 2 * MIB and release.wait(20)

    site.faults[:] = [stall]
    began = time.monotonic()
    with pytest.raises(Cancelled):
        plymix.merge(
            recipe({"a": site.path, "b": large}),
            out=tmp_path / "o.safetensors",
            progress=lambda now: time.monotonic() - began < 0.4,
        )
    assert time.monotonic() - began < 3
    release.set()
    site.faults.clear()
    assert not list(tmp_path.glob("o.safetensors")) + list(tmp_path.glob(".*tmp"))
    assert len(source.read(info)) == info.nbytes  # and it can be read afterwards
    source.close()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(large, site, status):
    fault(site, *[(status, {})] * 3)
    assert read(large, 0, 100) == site.path.read_bytes()[:100]
    assert len(site.requests) == 4


def test_a_server_may_ask_to_wait(large, site):
    fault(site, (429, {"Retry-After": "1"}))
    began = time.monotonic()
    read(large, 0, 100)
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "needs a login"), (403, "needs a login"), (404, "check the address"),
     (410, "check the address"), (418, "418"), (503, "6 tries")],
)  # fmt: skip
def test_what_will_not_pass_is_said(large, site, status, said):
    fault(site, *[(status, {})] * 9)
    with pytest.raises(Refusal, match=said) as caught:
        open_model(large)
    assert str(status) in str(caught.value)
    assert large in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there():
    with pytest.raises(Refusal, match=r"http://127.0.0.1:9/a .*refused.*3 tries"):
        open_model("http://127.0.0.1:9/a")


@pytest.mark.parametrize("what", ["etag", "size", "shorter"])
def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, large, site, what):
    with open_model(large) as source:
        whole = site.path.read_bytes()
        site.etags["/large.safetensors"] = "2" if what == "etag" else "1"
        if what != "etag":
            site.files["/large.safetensors"] = whole + b"x" if what == "size" else whole[:200_000]
        with pytest.raises(Failure, match="changed while it was read"):
            source.read(source.tensors["third"])


def test_it_is_an_error_in_a_merge_too(tmp_path, large, site):
    """The header comes from one version, the tensors from the next: nothing is written."""
    begun = []

    def change(handler, path):
        begun.append(path)
        site.etags[path] = "1" if len(begun) < 2 else "2"
        return False

    site.faults[:] = [change]
    with pytest.raises(Failure, match="changed while it was read"):
        plymix.merge(recipe({"a": site.path, "b": large}), out=tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_a_new_version_is_another_file(large, site):
    old = site.path.read_bytes()
    assert read(large) == old
    site.files["/large.safetensors"] = new = old[:-4] + b"news"
    site.etags["/large.safetensors"] = "2"
    assert read(large) == new


@pytest.mark.parametrize(
    ("header", "value", "error"),
    [
        ("Content-Range", "bytes 5-65540/13000000", "when 0 to 65,536"),
        ("Content-Range", "bytes 0-65535/1000", "when 0 to 65,536"),
        ("Content-Range", "bytes 0-99999/13000000", "when 0 to 65,536"),
        ("Content-Range", "pages 1-2/3", "no plain byte range"),
        ("Content-Range", f"bytes 0-65535/{1 << 60}", "claims to have"),
        ("Content-Encoding", "gzip", "no plain byte range"),
    ],
)
def test_answers_that_lie_are_refused(large, site, header, value, error):
    def lie(handler, path):
        handler.send_response(206)
        said = {"Content-Range": "bytes 0-65535/13000000", "Content-Length": "65536"}
        for name, text in (said | {header: value}).items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(bytes(65536))
        return True

    fault(site, lie)
    with pytest.raises(Refusal, match=error):
        open_model(large)


def test_a_wrong_length_is_noticed(large, site):
    def lie(handler, path):
        handler.send_response(206)
        handler.send_header("Content-Range", "bytes 0-65535/13000000")
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(bytes(100))
        return True

    fault(site, lie, lie)
    assert read(large, 0, 100) == site.path.read_bytes()[:100]


def test_a_truncated_file_is_named(large, site):
    site.files["/large.safetensors"] = site.path.read_bytes()[:-5]
    with pytest.raises(FormatError, match="truncated"):
        open_model(large)


def test_an_empty_file(site):
    site.files["/empty"] = b""
    with pytest.raises(FormatError, match="empty"):
        open_model(f"{site.address}/empty")


def test_a_server_without_ranges(large, site, monkeypatch):
    site.ranges = False
    assert read(large) == site.path.read_bytes()
    assert len(site.requests) <= 3
    monkeypatch.setattr(web, "WHOLE", MIB)
    site.etags["/large.safetensors"] = "2"
    with pytest.raises(Refusal, match=r"does not serve parts.*download it"):
        open_model(large)


# --- redirections, the Hub, proxies -------------------------------------------------------------


def test_redirections_are_followed_and_kept(large, site):
    site.redirects["/short"] = "/middle"
    site.redirects["/middle"] = large
    assert read(f"{site.address}/short", 0, 3 * MIB) == site.path.read_bytes()[: 3 * MIB]
    asked = [path for path, _ in site.requests]
    assert asked.count("/short") == 1


def test_an_address_that_was_good_for_a_while_only(large, site):
    site.redirects["/short"] = "/signed1"
    site.files["/signed1"] = site.path.read_bytes()
    handle = open_handle(urls.path(f"{site.address}/short"))
    del site.files["/signed1"]
    site.files["/signed2"] = site.path.read_bytes()
    site.redirects["/short"] = "/signed2"
    out = bytearray(100)
    handle.read_at(MIB, out)
    handle.close()
    assert out == site.path.read_bytes()[MIB : MIB + 100]


@pytest.mark.parametrize("target", ["/loop", "ftp://h/x", "file:///etc/passwd", ""])
def test_redirections_that_lead_nowhere(site, target):
    site.redirects["/loop"] = target
    with pytest.raises(Refusal, match=r"redirections|address that is none"):
        open_model(f"{site.address}/loop")


def test_the_hub(large, site, monkeypatch):
    """Its token goes to the Hub and not to where the Hub leads; its tag is the SHA-256."""
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    monkeypatch.setenv("HF_TOKEN", "HUSH")
    start = "/o/r/resolve/v1/d/m.safetensors"
    site.redirects[start] = large.replace("127.0.0.1", "localhost") + "?sign=x"
    site.headers[start] = {"X-Linked-ETag": '"' + "cd" * 32 + '"', "X-Linked-Size": "1"}
    handle = open_handle(urls.path("hf://o/r/d/m.safetensors@v1"))
    assert handle.sha256 == "cd" * 32
    handle.close()
    given = {path: headers.get("Authorization") for path, headers in site.requests}
    assert given == {start: "Bearer HUSH", "/large.safetensors?sign=x": None}


def test_the_token_is_for_the_hub_only(large, site, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "HUSH")
    open_model(large).close()
    assert all("Authorization" not in headers for _, headers in site.requests)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_what_to_do(site, monkeypatch, status):
    monkeypatch.setenv("HF_ENDPOINT", site.address)
    fault(site, *[(status, {})] * 3)
    with pytest.raises(Refusal, match=r"hf://o/r/m .*HF_TOKEN"):
        open_model("hf://o/r/m")


def test_a_proxy_is_used(large, site, monkeypatch):
    monkeypatch.setenv("http_proxy", site.address)
    monkeypatch.delenv("no_proxy", raising=False)
    site.files["http://models.example/m"] = site.path.read_bytes()
    assert read("http://models.example/m", 0, 9) == site.path.read_bytes()[:9]


def test_a_folder_that_cannot_be_written(tmp_path, large, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "file"))
    with pytest.raises(PlymixError, match="PLYMIX_CACHE"):
        open_model(large)
