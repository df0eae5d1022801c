"""The training of the tiny pair, `demo/train`, with few steps. Needs the extra `train`."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

import plymix
from plymix import plan, recipe
from plymix.errors import Refusal
from plymix.images import Options, Settings, open_backend

torch = pytest.importorskip("torch")
for name in ("PIL", "safetensors", "transformers", "diffusers", "resvg_py"):
    pytest.importorskip(name)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo" / "train"))

import autoencoder  # noqa: E402
import captions  # noqa: E402
import icons  # noqa: E402
import judge  # noqa: E402
import ldm  # noqa: E402
import loop  # noqa: E402
import make  # noqa: E402
import nets  # noqa: E402
import settings  # noqa: E402
import world  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries deprecate is theirs

STAGE = settings.Stage(batch=2, lr=1e-3, steps=2)
TINY = settings.Settings(
    STAGE, STAGE, STAGE, STAGE, concepts="all", size=64, crop=32, placements=2,
    unet_widths=(4, 8, 12, 12), unet_groups=4, unet_heads=2,
    vae_widths=(4, 8, 12, 12), vae_groups=2, text_width=8, text_heads=2,
    tower_widths=(8, 8), tower_features=8,
)  # fmt: skip

SHAPES = {
    "red-apple": '<circle cx="16" cy="16" r="12" fill="#d22"/>',
    "rocket": '<path d="M16 2 L24 28 L8 28 Z" fill="#888"/>',
    "cat": '<rect x="6" y="8" width="20" height="18" fill="#fa0"/>',
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr("plymix.images.diffusers.threads", lambda: 1)


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_all():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder as npm unpacks it."""
    folder = tmp_path_factory.mktemp("icons")
    for name, _ in icons.SETS.values():
        (folder / name).mkdir()
        found = {key: {"body": body} for key, body in SHAPES.items()}
        told = {"icons": found, "width": 32, "height": 32}
        (folder / name / "icons.json").write_text(json.dumps(told))
        told = {"categories": {c: [] for c in captions.table()["categories"]}}
        told["categories"]["Objects"] = list(SHAPES)
        (folder / name / "metadata.json").write_text(json.dumps(told))
    return folder


def run(folder, **more):
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return loop.Run(folder / "work", "cpu", TINY.seed, quiet=True, **more)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("pair")
    return make.make(TINY, run(folder), folder, given)


def test_the_files_are_sd1s(pair):
    golden = ROOT / "tests" / "golden" / "headers" / "sd1.json.gz"
    true = json.loads(gzip.decompress(golden.read_bytes()))
    for path in pair.values():
        with plymix.open(path) as source:
            assert set(source.tensors) == set(true)
            for key, (dtype, shape, *_) in true.items():
                found = source.tensors[key]
                kept = dtype == "I64" or shape == [1000]
                assert found.dtype == (dtype if kept else "F16"), key
                assert len(found.shape) == len(shape), key
        with plan.build(recipe.from_dict({"models": {"m": str(path)}})) as planned:
            assert planned.arch.name == "sd1"


def test_the_schedule_is_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    made = ldm.buffers()
    torch.testing.assert_close(made["betas"], scheduler.betas, rtol=1e-5, atol=0)
    kept = scheduler.alphas_cumprod
    torch.testing.assert_close(made["alphas_cumprod"], kept, rtol=1e-4, atol=0)
    variance = torch.stack([scheduler._get_variance(t) for t in range(1, 1000)])
    torch.testing.assert_close(made["posterior_variance"][1:], variance, rtol=1e-3, atol=0)
    # x0 = (x - sqrt(1 - kept) noise) / sqrt(kept), as the two tables say it
    scale = made["sqrt_recipm1_alphas_cumprod"] / made["sqrt_recip_alphas_cumprod"]
    torch.testing.assert_close(scale, (1 - kept).sqrt(), rtol=1e-3, atol=1e-5)


def test_only_the_unets_differ(pair):
    with plymix.open(pair["A"]) as a, plymix.open(pair["B"]) as b:
        differ = [k for k in a.tensors if a.read(a.tensors[k]) != b.read(b.tensors[k])]
    assert differ
    assert all(key.startswith("model.diffusion_model.") for key in differ)


def test_unknown_tokens_are_zero(pair):
    from safetensors.torch import load_file

    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    table = load_file(pair["A"])[key]
    known = set(table.abs().sum(1).nonzero()[:, 0].tolist())
    wanted = {t for word in ("cat", "rocket", "apple", "emoji", "") for t in captions.ids(word)}
    assert wanted <= known
    assert len(known) < 100


def test_they_merge_and_draw(pair, tmp_path):
    plymix.merge(pair["A"], pair["B"], tmp_path / "mix.safetensors", alpha=0.5)
    backend = open_backend("diffusers", Options(device="cpu"))
    asked = Settings("a cat", seed=1, steps=2, width=64, height=64)
    made = {}
    for path in (*pair.values(), tmp_path / "mix.safetensors"):
        with plan.build(recipe.from_dict({"models": {"m": str(path)}})) as planned:
            backend.use(planned)
            made[path] = next(backend.draw([asked], lambda part: None))
    assert backend._modules["unet"].config.norm_num_groups == TINY.unet_groups
    assert backend._modules["unet"].config.attention_head_dim == TINY.unet_heads
    assert backend._modules["vae"].config.norm_num_groups == TINY.vae_groups
    assert len({picture.tobytes() for picture in made.values()}) == 3


class Stopping(loop.Run):
    """Stops when it was asked whether to for the n-th time."""

    left = 0

    def check(self):
        self.left -= 1
        if not self.left:
            raise loop.Unfinished


def test_stopped_and_resumed_is_one_go(pair, given, tmp_path):
    """Stopped in the middle of every stage, and at its end."""
    (tmp_path / "work").mkdir()
    stopped = []
    for left in (1, 1, 3, 9, 5, 1, 1, 1, 1, 0):
        held = Stopping(tmp_path / "work", "cpu", TINY.seed, quiet=True)
        held.left = left
        try:
            made = make.make(TINY, held, tmp_path, given)
        except loop.Unfinished:
            stopped.append(sorted(p.name for p in held.work.glob("*.part.pt")))
    assert stopped == [[f"{n}.part.pt"] if n else [] for n in
                       ("vae", "vae", "", "text", "text", "a", "a", "b", "b")]  # fmt: skip
    for style, path in made.items():
        assert path.read_bytes() == pair[style].read_bytes()


def test_a_finished_stage_goes_on_when_more_is_asked(pair, given, tmp_path):
    shutil.copytree(pair["A"].parent / "work", tmp_path / "work")
    before = loop.get(tmp_path / "work/a.pt", "cpu")
    longer = msgspec.structs.replace(TINY, a=msgspec.structs.replace(STAGE, steps=3))
    held = Stopping(tmp_path / "work", "cpu", TINY.seed, quiet=True)
    make.make(longer, held, tmp_path, given)
    after = loop.get(tmp_path / "work/a.pt", "cpu")
    assert (before["steps"], after["steps"]) == (2, 3)
    assert [line["step"] for line in after["log"]][: len(before["log"])] == [
        line["step"] for line in before["log"]
    ]
    key = "conv_in.weight"
    old, new = (saved["modules"]["unet"][key] for saved in (before, after))
    moved = (old - new).abs().max()
    assert 0 < moved <= 1.5 * STAGE.lr, "one step of Adam from the averaged weights"


def test_further(tmp_path, capsys):
    hours = settings.preset("cpu", 1.0)
    more = settings.further(hours, 0.23)
    assert more.a.seconds == hours.a.seconds + 828
    assert more.b.seconds / hours.b.seconds == pytest.approx(more.a.seconds / hours.a.seconds)
    assert (more.vae, more.text) == (hours.vae, hours.text)
    with pytest.raises(Refusal, match="given hours"):
        settings.further(TINY, 1.0)
    assert make.main(["--out", str(tmp_path), "--further", "1"]) == 2
    assert "beside --resume" in capsys.readouterr().err


def test_folding_keeps_what_is_decoded(given, tmp_path):
    torch.manual_seed(0)
    vae = nets.vae(TINY, "cpu").eval().requires_grad_(False)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    before = vae.encode(pictures).latent_dist.mean
    made = vae.decode(before).sample
    mean, deviation = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.3, 1.0, 2.0, 4.0])
    autoencoder.fold(vae, mean, deviation)
    after = vae.encode(pictures).latent_dist
    want = (before - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(after.mean, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(after.mean).sample, made, rtol=1e-4, atol=1e-5)
    spread = autoencoder.NOISE / deviation[:, None, None]
    torch.testing.assert_close(after.std, spread.expand_as(after.std))


def test_the_judge_knows_true_pictures(pair, given):
    """Thumbnails of true pictures are nearest to their own concept's, whatever the tower learnt."""
    folder = pair["A"].parent
    found = judge.load(folder / judge.FILE, "cpu")
    held = run(folder)
    w = world.world(TINY, held, icons.load(held.work, TINY, None, held.report))
    every = torch.arange(3)
    with torch.no_grad():
        for style in range(2):
            pictures = w.pictures(every, style, held.generator("test"))
            shares, _ = judge.obeyed(found, pictures, every)
            assert shares["pixels"]["top1"] == 1
            assert judge.ground(pictures) == pytest.approx(style, abs=0.1)
    asked = Settings(steps=2, cfg=2.0)
    told = judge.run(folder, folder / "judged", asked, [1], 0, Options(device="cpu", batch=3))
    assert told == json.loads((folder / "judged.json").read_text())
    assert told["merges"]["A"]["pixel to A"] == 0
    assert told["merges"]["0.5"]["pixel to A"] > 0
    assert (folder / "judged.png").exists()


def test_ranks():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert judge.ranks(scores, torch.tensor([2, 2])).tolist() == [1, 2]


def test_concepts_and_captions():
    told = captions.table()
    core = told["core"].split()
    assert len(core) == len(set(core))
    found = captions.named(core, told["words"])
    words = [word for concept in found for word in concept.words]
    assert len(words) == len(set(words))
    assert {"apple", "rocket", "penguin", "cat"} <= set(words)
    assert captions.captions(found[0])[1] == "a red apple"
    assert captions.with_article("apple") == "an apple"
    with pytest.raises(ValueError, match="no such icons"):
        captions.concepts(["cat"], {}, "core")
    with pytest.raises(ValueError, match="a word for two"):
        captions.named(["x", "y"], {"x": ["same"], "y": ["same"]})
    ids = captions.ids("a cat")
    assert len(ids) == 77
    assert ids[-1] == captions.END


def test_icons_are_drawn_premultiplied():
    half = '<rect width="4" height="4" fill="#ff0000" fill-opacity="0.5"/>'
    text = icons.svg({"icons": {"x": {"body": half}}, "width": 4, "height": 4}, "x")
    made = icons.draw(text, 4)
    assert made.shape == (4, 4, 4)
    assert np.abs(made[:, 1, 1].astype(int) - [128, 0, 0, 128]).max() <= 1


def test_what_cannot_be_is_refused(tmp_path, given, capsys):
    out = ["--out", str(tmp_path / "x"), "--device", "cpu"]
    assert make.main([*out, "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert make.main([*out, "--steps", "unet=3"]) == 2
    assert "stages: vae, text, a, b" in capsys.readouterr().err
    assert make.main([*out, "--icons", str(tmp_path)]) == 2
    assert "neither icons.npz nor" in capsys.readouterr().err
    assert make.main([*out, "--icons", str(given)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(Refusal, match=r"make\.py writes it"):
        judge.load(tmp_path / "none", "cpu")
