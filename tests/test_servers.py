"""Pictures by running servers: small ones that speak A1111's and ComfyUI's API, on this machine.

They "draw" from the bytes of the checkpoint file they are told to use, so a picture shows which
model it was made with; and they fail in all the ways that servers fail.
"""

import base64
import io
import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

import plymix
from plymix import api, cli, plan, recipe
from plymix.errors import Failure, Refusal
from plymix.images import Options, Settings, open_backend
from tiny import write

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return [str(write(folder / f"{n}.safetensors", "sd1", i)) for i, n in enumerate("ab")]


def drawn(path, seed, width, height, *more):
    """The picture that the servers here draw with a file."""
    key = zlib.crc32(repr((seed, more)).encode(), zlib.crc32(path.read_bytes()))
    rng = np.random.Generator(np.random.Philox(key=key))
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


class Handler(BaseHTTPRequestHandler):
    """GET and POST to the server's `get` and `post`: (status, document or bytes)."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.answer(json.loads(self.rfile.read(length) or "null"))

    def answer(self, body):
        fake = self.server.fake
        path = urlsplit(self.path)
        fake.asked.append((path.path, body))
        fault = fake.faults.get(path.path)
        if fault == "hang":
            time.sleep(1.5)
            return
        if fault == "die":
            self.server.socket.close()
            self.connection.close()
            return
        if fault:
            status, found = fault
        else:
            status, found = fake.reply(path.path, parse_qs(path.query), body)
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Fake:
    """What both servers have: a folder of checkpoints, a record of what was asked, faults."""

    def __init__(self, folder):
        self.folder, self.asked, self.faults = folder, [], {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self):
        return [path for path, _ in self.asked]


class FakeA1111(Fake):
    name = "a1111"
    samplers = ("Euler", "Euler a", "DPM++ 2M", "DDIM", "UniPC", "LCM", "DPM++ SDE")

    def __init__(self, folder):
        super().__init__(folder)
        self.files, self.chosen = {}, "mine.ckpt [123]"

    def reply(self, path, query, body):
        match path.removeprefix("/sdapi/v1/"):
            case "samplers":
                return 200, [{"name": n, "aliases": []} for n in self.samplers]
            case "options" if body is None:
                return 200, {"sd_model_checkpoint": self.chosen}
            case "options":
                self.chosen = body["sd_model_checkpoint"]
                return 200, None
            case "refresh-checkpoints":
                self.files = {f"{p.stem} [x]": p for p in self.folder.glob("*.safetensors")}
                return 200, None
            case "sd-models":
                return 200, [{"title": t, "filename": str(p)} for t, p in self.files.items()]
            case "txt2img":
                file = self.files.get(body["override_settings"]["sd_model_checkpoint"])
                if file is None:
                    return 404, {"detail": "no such checkpoint"}
                more = (body["prompt"], body["negative_prompt"], body["steps"], body["cfg_scale"])
                pixels = drawn(file, body["seed"], body["width"], body["height"], *more)
                return 200, {"images": [base64.b64encode(png(pixels)).decode()]}
            case "interrupt":
                return 200, {}
        return 404, {"detail": "Not Found"}


class FakeComfyUI(Fake):
    name = "comfyui"

    def __init__(self, folder):
        super().__init__(folder)
        self.made, self.waits, self.error = {}, 1, None

    def reply(self, path, query, body):
        if path == "/system_stats":
            return 200, {"system": {"comfyui_version": "0.3"}}
        if path.startswith("/object_info/"):
            names = [f"sub/{p.name}" for p in self.folder.glob("*.safetensors")]
            loader = {"input": {"required": {"ckpt_name": [names, {}]}}}
            return 200, {"CheckpointLoaderSimple": loader}
        if path == "/prompt":
            return self.queued(body["prompt"])
        if path.startswith("/history/"):
            number = path.rpartition("/")[2]
            if self.error:
                messages = [["execution_error", {"exception_message": self.error}]]
                return 200, {number: {"status": {"status_str": "error", "messages": messages}}}
            self.waits -= 1
            if self.waits > 0:
                return 200, {}
            image = {"filename": f"{number}.png", "subfolder": "", "type": "temp"}
            status = {"status_str": "success", "completed": True}
            return 200, {number: {"status": status, "outputs": {"9": {"images": [image]}}}}
        if path == "/view":
            return 200, self.made[query["filename"][0]]
        return 200, {}

    def queued(self, nodes):
        """Walk the graph from its picture back, as ComfyUI does."""
        kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
        decode = nodes[kinds["PreviewImage"]["images"][0]]["inputs"]
        sampler = nodes[decode["samples"][0]]["inputs"]
        checkpoint = nodes[sampler["model"][0]]["inputs"]["ckpt_name"]
        assert decode["vae"] == [sampler["model"][0], 2]
        texts = [nodes[sampler[n][0]]["inputs"]["text"] for n in ("positive", "negative")]
        size = nodes[sampler["latent_image"][0]]["inputs"]
        file = self.folder / checkpoint.removeprefix("sub/")
        if not file.exists():
            error = {"message": "Prompt outputs failed validation"}
            return 400, {"error": error, "node_errors": {}}
        more = (*texts, sampler["steps"], sampler["cfg"])
        pixels = drawn(file, sampler["seed"], size["width"], size["height"], *more)
        number = f"n{len(self.made)}"
        self.made[f"{number}.png"] = png(pixels)
        return 200, {"prompt_id": number}


@pytest.fixture(params=[FakeA1111, FakeComfyUI], ids=["a1111", "comfyui"])
def fake(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("plymix.images.comfyui.PAUSE", 0.01)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    found = request.param(folder)
    yield found
    found.server.shutdown()
    found.server.server_close()


def opened(fake, **more):
    return open_backend(fake.name, Options(url=fake.url, folder=str(fake.folder), **more))


CAT = Settings("a cat", "bad", 5, 9, 6.5, "euler_a", 64, 72)


def test_a_picture_is_drawn_with_the_merged_file(fake, pair, tmp_path):
    mix = api.two_models(*pair, alpha=0.25)
    plymix.merge(mix, tmp_path / "mix.safetensors")
    backend = opened(fake, keep=True)
    with plan.build(mix) as planned:
        backend.use(planned)
        (got,) = backend.draw([CAT], lambda part: None)
    backend.close()
    (kept,) = fake.folder.iterdir()
    assert kept.read_bytes() == (tmp_path / "mix.safetensors").read_bytes()
    assert np.array_equal(got, drawn(kept, 5, 64, 72, "a cat", "bad", 9, 6.5))


def test_a_sheet_leaves_nothing_behind(fake, pair, tmp_path):
    mine = write(fake.folder / "mine.safetensors", "sd1", 9)
    words = ["compare", *pair, "--each", "A", "--each", "B", "--each", "0.5", "--seeds", "1-2"]
    words += ["--backend", fake.name, "--url", fake.url, "--model-folder", str(fake.folder)]
    assert cli.run([*words, "--size", "64x64", "--prompt", "a cat", "-o", "s.png"]) == 0
    assert list(fake.folder.iterdir()) == [mine]
    cells = json.loads((tmp_path / "s.json").read_text())["cells"]
    assert len({c["pixels"] for c in cells}) == 6
    if fake.name == "a1111":
        assert fake.chosen == "mine.ckpt [123]"  # as before
        told = next(body for path, body in fake.asked if path.endswith("txt2img"))
        assert told["override_settings"]["sd_vae"] == "None"
        assert told["batch_size"] == told["n_iter"] == 1


def test_no_two_merges_lie_there_at_once(fake, pair):
    backend = opened(fake)
    for alpha in (0.25, 0.5, 0.75):
        with plan.build(api.two_models(*pair, alpha=alpha)) as planned:
            backend.use(planned)
            list(backend.draw([CAT], lambda part: None))
        assert len(list(fake.folder.iterdir())) == 1
    backend.close()
    assert not list(fake.folder.iterdir())


def test_a_model_that_lies_there_is_used_as_it_is(fake):
    mine = write(fake.folder / "mine.safetensors", "sd1", 9)
    backend = opened(fake)
    with plan.build(recipe.from_dict({"models": {"m": str(mine)}})) as planned:
        backend.use(planned)
        (got,) = backend.draw([CAT], lambda part: None)
    backend.close()
    assert list(fake.folder.iterdir()) == [mine]
    assert np.array_equal(got, drawn(mine, 5, 64, 72, "a cat", "bad", 9, 6.5))


def failing(fake, pair, **more):
    """The error of drawing one picture; nothing may stay in the folder."""

    def draw():
        backend = opened(fake, **more)
        try:
            with plan.build(api.two_models(*pair, alpha=0.5)) as planned:
                backend.use(planned)
                list(backend.draw([CAT], lambda part: None))
        finally:
            backend.close()

    with pytest.raises(Failure) as found:
        draw()
    assert not list(fake.folder.iterdir())
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


DRAWING = {"a1111": "/sdapi/v1/txt2img", "comfyui": "/prompt"}
LISTING = {"a1111": "/sdapi/v1/sd-models", "comfyui": "/object_info/CheckpointLoaderSimple"}


@pytest.mark.parametrize("at", [DRAWING, LISTING], ids=["drawing", "listing"])
def test_a_server_that_dies(at, fake, pair):
    fake.faults[at[fake.name]] = "die"
    text = failing(fake, pair)
    assert "broke off" in text or "no " in text
    assert fake.url in text


def test_a_server_that_is_too_slow(fake, pair):
    fake.faults[DRAWING[fake.name]] = "hang"
    assert "within 0.3 s; --timeout waits longer" in failing(fake, pair, timeout=0.3)


def test_a_server_that_refuses(fake, pair):
    fake.faults[DRAWING[fake.name]] = (500, {"detail": "CUDA out of memory"})
    assert "500 CUDA out of memory" in failing(fake, pair)


def test_a_server_that_talks_nonsense(fake, pair):
    fake.faults[DRAWING[fake.name]] = (200, b"<html>hello</html>")
    assert "did not answer in JSON" in failing(fake, pair)
    fake.faults[DRAWING[fake.name]] = (200, {})
    assert "sent no picture" in (text := failing(fake, pair)) or "did not take" in text


def test_a_server_with_another_folder(fake, pair, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    fake.folder, there = other, fake.folder
    backend = open_backend(fake.name, Options(url=fake.url, folder=str(there)))
    text = "--model-folder must be its own folder of checkpoints"
    with plan.build(api.two_models(*pair)) as planned, pytest.raises(Failure, match=text):
        backend.use(planned)
    assert not list(there.iterdir())


def test_a_server_that_is_another_one(fake):
    """A web UI without `--api` answers 404; one with a password 401."""
    first = {"a1111": "/sdapi/v1/samplers", "comfyui": "/system_stats"}[fake.name]
    for code, hint in ((404, "tart it"), (401, "http://NAME:PASSWORD@HOST")):
        fake.faults[first] = (code, {"detail": "no"})
        with pytest.raises(Failure, match=f"{code} no; .*{hint}"):
            opened(fake)


def test_no_server_at_all(fake, pair):
    fake.server.shutdown()
    fake.server.server_close()
    text = failing(fake, pair)
    assert text.startswith("no ")
    assert "--url" in text


def test_what_is_asked_for_wrongly(fake):
    with pytest.raises(Refusal, match="--model-folder DIR"):
        open_backend(fake.name, Options(url=fake.url))
    with pytest.raises(Refusal, match="is not a folder"):
        open_backend(fake.name, Options(url=fake.url, folder="nowhere"))
    for url in ("file:///etc/passwd", "http://[::1", "http://127.0.0.1:port", "127.0.0.1:7860"):
        with pytest.raises(Refusal, match="write it as http"):
            open_backend(fake.name, Options(url=url, folder=str(fake.folder)))


def test_a_stopped_sheet_goes_on_after_the_server_died(fake, pair, tmp_path, capsys):
    words = ["compare", *pair, "--each", "A", "--each", "B", "--seeds", "1-3", "--size", "64x64"]
    words += ["--backend", fake.name, "--url", fake.url, "--model-folder", str(fake.folder)]
    fake.faults[DRAWING[fake.name]] = (500, {"detail": "out of memory"})
    assert cli.run([*words, "-o", "s.png"]) == 1
    fake.faults.clear()
    assert cli.run([*words, "-o", "s.png"]) == 0
    assert cli.run([*words, "-o", "t.png"]) == 0
    cells = [json.loads((tmp_path / f"{n}.json").read_text())["cells"] for n in "st"]
    assert [c["pixels"] for c in cells[0]] == [c["pixels"] for c in cells[1]]
    assert not list(fake.folder.iterdir())


def test_karras_is_a_scheduler_in_new_web_uis(pair, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fake = FakeA1111(folder)
    karras = Settings(sampler="dpmpp_2m_karras", width=64, height=64)
    backend = opened(fake)
    request = backend._request(karras)
    assert (request["sampler_name"], request["scheduler"]) == ("DPM++ 2M", "Karras")
    fake.samplers = ("DPM++ 2M Karras",)
    request = opened(fake)._request(karras)
    assert (request["sampler_name"], "scheduler" in request) == ("DPM++ 2M Karras", False)
    with pytest.raises(Refusal, match=r"has no sampler 'Euler'; it has DPM\+\+ 2M Karras"):
        opened(fake)._request(Settings(sampler="euler"))
    fake.server.shutdown()
    fake.server.server_close()


def test_what_a_server_cannot_draw_is_refused_before_anything_is_merged(
    pair, tmp_path, monkeypatch, capsys
):
    """Not after the rows before it: no model is written, no file hashed, no picture asked for."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fake = FakeA1111(folder)
    fake.samplers = ("Euler a",)

    def never(*_):
        raise AssertionError("work before a refusal")

    monkeypatch.setattr("plymix.hashes.model_sha256", never)
    monkeypatch.setattr("plymix.api.run", never)
    words = ["compare", *pair, "--size", "64x64", "--backend", "a1111", "--url", fake.url]
    words += ["--model-folder", str(folder), "--x", "sampler=euler_a,euler"]
    assert cli.run(words) == 2
    assert "has no sampler 'Euler'; it has Euler a" in capsys.readouterr().err
    recipe = tmp_path / "shards.toml"
    recipe.write_text(
        f'[models]\na = "{pair[0]}"\nb = "{pair[1]}"\n[steps.m]\nmethod = "weighted_sum"\na = "a"\n'
        'b = "b"\n[output]\nshard = 1000000\n'
    )
    assert cli.run([*words[:1], "--from", str(recipe), *words[3:-2]]) == 2
    assert "a server loads one file: leave out output.shard" in capsys.readouterr().err
    assert not list(folder.iterdir())
    assert not any("txt2img" in path for path, _ in fake.asked)
    fake.server.shutdown()
    fake.server.server_close()


def test_a_password_in_the_url_is_sent_and_not_shown(pair, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fake = FakeA1111(folder)
    for said, sent in (("me:secret", b"me:secret"), ("me:%40secret%3A%2F", b"me:@secret:/")):
        url = fake.url.replace("//", f"//{said}@")
        backend = open_backend("a1111", Options(url=url, folder=str(folder)))
        told = backend.server.headers["Authorization"]
        assert base64.b64decode(told.removeprefix("Basic ")) == sent
    assert "secret" not in backend.label
    fake.server.shutdown()
    fake.server.server_close()


def test_what_comfyui_says_of_its_failure(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("plymix.images.comfyui.PAUSE", 0.01)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    fake = FakeComfyUI(folder)
    fake.error = "Allocation on device\n"
    assert "failed: Allocation on device" in failing(fake, pair)
    fake.error, fake.waits = None, 10_000
    assert "drew no picture within 0.2 s" in failing(fake, pair, timeout=0.2)
    # its own graph, whether it waits or is drawn; no other user's
    assert fake.asked[-2:] == [
        ("/queue", {"delete": ["n1"]}), ("/interrupt", {"prompt_id": "n1"}),
    ]  # fmt: skip
    fake.server.shutdown()
    fake.server.server_close()
