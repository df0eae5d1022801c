"""Pictures in process: the backend `diffusers`, with small random models. Needs the extra `images`.

Sockets are closed to all but this machine.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plymix
from plymix import api, cli, plan, recipe
from plymix.errors import Refusal
from plymix.images import Options, Settings, compare, grid, open_backend, rows, samplers, tokens

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")
pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

from pictures import model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries deprecate is theirs

ARCHS = ("sd1", "sd2", "sdxl")
CAT = Settings("a cat", "bad", seed=3, steps=2, width=64, height=64)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nobody but this machine can be reached, and nobody tries to."""

    def refused(self, address):
        raise AssertionError(f"a connection to {address}")

    def lookup(*args, **kwargs):
        raise AssertionError(f"a look-up of {args}")

    torch.set_num_threads(1)
    monkeypatch.setattr("plymix.images.diffusers.threads", lambda: 1)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("PLYMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        arch: [str(model(folder / f"{arch}-{n}.safetensors", arch, i)) for i, n in enumerate("ab")]
        for arch in ARCHS
    }


@pytest.fixture(scope="module")
def backend():
    return open_backend("diffusers", Options(device="cpu"))


def single(path):
    return recipe.from_dict({"models": {"m": str(path)}})


def draw(backend, found, *asked):
    with plan.build(found) as planned:
        backend.use(planned)
        return list(backend.draw(asked or [CAT], lambda part: None))


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_all_weights_0_or_1_are_the_single_models(arch, pairs, backend):
    a, b = pairs[arch]
    first, second = draw(backend, single(a)), draw(backend, single(b))
    assert np.abs(first[0].astype(int) - second[0]).mean() > 5
    assert first[0].std() > 10
    assert same(draw(backend, api.two_models(a, b, alpha=0.0)), first)
    assert same(draw(backend, api.two_models(a, b, alpha=1.0, vae="b")), second)
    half = draw(backend, api.two_models(a, b, alpha=0.5))
    assert not same(half, first)
    assert not same(half, second)


@pytest.mark.parametrize("arch", ARCHS)
def test_in_place_is_written_and_loaded(arch, pairs, backend, tmp_path):
    """After other merges in the same pipeline, the pictures are those of the written file."""
    a, b = pairs[arch]
    mix = api.two_models(a, b, alpha="GRAD_V", base=0.25, vae="blend")
    draw(backend, api.two_models(a, b, alpha=0.9))
    live = draw(backend, mix)
    plymix.merge(mix, tmp_path / "mix.safetensors")
    fresh = open_backend("diffusers", Options(device="cpu"))
    assert same(live, draw(fresh, single(tmp_path / "mix.safetensors")))


def test_only_what_changed_is_touched(pairs, backend):
    a, b = pairs["sd1"]
    words = [("0.5",), ("0.5", "IN05=0.25"), ("0.5", "IN05=0.25")]
    draw(backend, rows.made(words[0], rows.Models(a, b)))
    before = {name: p.clone() for name, p in backend._params.items()}
    with plan.build(rows.made(words[1], rows.Models(a, b))) as planned:
        backend.use(planned)
        block = [t for t in planned.tensors if planned.places[t.name].block == "IN05"]
        assert backend._live.moved == sum(t.nbytes for t in block)
    moved = {name for name, p in backend._params.items() if not torch.equal(p, before[name])}
    assert len(moved) == len(block)
    assert all(name.startswith(("unet/down_blocks.1.resnets.1", "unet/down_blocks.1.attentions.1"))
               for name in moved)  # fmt: skip


def test_models_that_stay_on_the_device(pairs):
    """The way of GPUs, on the CPU: the same numbers, from files read once."""
    a, b = pairs["sd1"]
    plain, other = (open_backend("diffusers", Options(device="cpu")) for _ in range(2))
    other.resident = True
    models = rows.Models(a, b)
    words = ["A", "0.5", "0.5 IN05=0.125", "GRAD_V base=1 vae=b", "0.3 method=slerp", "B",
             "0.25 dtype=bf16"]  # fmt: skip
    runs = []
    counted = other._keeper

    def keeper():
        made = counted()
        inner = made._sum
        made._sum = lambda run: (runs.append(run), inner(run))
        return made

    other._keeper = keeper
    for row in words:
        with plan.build(rows.made(rows.split(row), models)) as planned:
            runs.clear()
            for each in (plain, other):
                each.use(planned)
            # a sum over a whole line is one run, whatever the number of its tensors
            assert len(runs) <= {"0.5": 3, "0.5 IN05=0.125": 10}.get(row, 99)
        assert other._live.moved == plain._live.moved
        for name, value in plain._params.items():
            assert torch.equal(value, other._params[name]), (row, name)


def as_pipeline(path, arch, folder, predicts="epsilon"):
    """The same checkpoint through diffusers' own single-file loader, in float32."""
    backend = open_backend("diffusers", Options(device="cpu"))
    with plan.build(single(path)) as planned:
        backend.use(planned)
    own = backend._modules
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        steps_offset=1,
        prediction_type=predicts,
    )
    write_folder(folder, own, scheduler)
    kind = "StableDiffusionXLPipeline" if arch == "sdxl" else "StableDiffusionPipeline"
    return getattr(diffusers, kind).from_single_file(
        path, config=str(folder), torch_dtype=torch.float32
    )


def write_folder(folder, modules, scheduler):
    """Configs and tokenizer for `from_single_file(config=...)`."""
    from transformers import CLIPTokenizer

    ids, ranks = tokens._vocabulary()
    ids = {**ids, "<|startoftext|>": tokens.START, "<|endoftext|>": tokens.END}
    index = {"_class_name": "StableDiffusionPipeline",
             "scheduler": ["diffusers", type(scheduler).__name__],
             "safety_checker": [None, None], "feature_extractor": [None, None],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    if "text_encoder_2" in modules:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False,
                  "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                  "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    for name, module in modules.items():
        (folder / name).mkdir(parents=True)
        if name.startswith("text"):
            module.config.save_pretrained(folder / name)
        else:
            module.save_config(folder / name)
    for name in ("tokenizer", "tokenizer_2")[: 1 + ("text_encoder_2" in modules)]:
        openai = name == "tokenizer" and modules["text_encoder"].config.hidden_act == "quick_gelu"
        pad = "<|endoftext|>" if openai else "!"
        made = CLIPTokenizer(vocab=ids, merges=list(ranks), pad_token=pad, model_max_length=77)
        made.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("arch", "predicts"),
    [("sd1", ""), ("sdxl", ""), ("sd2", "epsilon"), ("sd2", "v_prediction")],
)
def test_pictures_are_those_of_diffusers_own_pipeline(arch, predicts, pairs, backend, tmp_path):
    path = pairs[arch][0]
    if predicts:
        said = {"modelspec.prediction_type": predicts.removesuffix("_prediction")}
        path = str(model(tmp_path / "m.safetensors", arch, 0, metadata=said))
    pipeline = as_pipeline(path, arch, tmp_path / "config", predicts or "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    asked = Settings("a red cat, 日本", "bad, worse", 7, 4, 7.0, "euler_a", 64, 96)
    image = pipeline(
        asked.prompt, negative_prompt=asked.negative, num_inference_steps=4, guidance_scale=7.0,
        width=64, height=96, generator=generator, output_type="np",
    ).images[0]  # fmt: skip
    want = np.round(image * 255)
    got = draw(backend, single(path), asked)[0].astype(int)
    # diffusers takes its noise levels linearly between steps, k-diffusion in the logarithm
    assert np.abs(got - want).max() <= 4
    assert np.abs(got - want).mean() < 0.5


@pytest.mark.parametrize("arch", ["sdxl"])
def test_a_folder_is_its_checkpoint(arch, pairs, backend, tmp_path):
    """A diffusers folder with the same weights gives the same pictures."""
    path = pairs[arch][0]
    alone = draw(backend, single(path))
    fresh = open_backend("diffusers", Options(device="cpu", precision="fp16"))
    with plan.build(single(path)) as planned:
        fresh.use(planned)
    folder = tmp_path / "folder"
    write_folder(folder, fresh._modules, diffusers.EulerAncestralDiscreteScheduler())
    for name, module in fresh._modules.items():
        module.half().save_pretrained(folder / name)
    assert same(draw(backend, single(folder)), alone)


def test_what_shapes_cannot_tell_stands_in_the_metadata(pairs, backend, tmp_path):
    said = {"text_encoder": {"num_attention_heads": 4}, "unet": {"norm_num_groups": 4}}
    key = "plymix.model_config"
    path = model(tmp_path / "m.safetensors", "sd1", 0, metadata={key: json.dumps(said)})
    told = draw(backend, single(path))
    assert backend._modules["unet"].config.norm_num_groups == 4
    assert backend._modules["text_encoder"].config.num_attention_heads == 4
    assert not same(told, draw(backend, single(pairs["sd1"][0])))
    plymix.merge(path, pairs["sd1"][1], tmp_path / "mix.safetensors", alpha=0.0)
    assert same(draw(backend, single(tmp_path / "mix.safetensors")), told)


def test_what_cannot_be_drawn_is_refused(backend, tmp_path):
    from tiny import write

    flux = write(tmp_path / "flux.safetensors", "flux-dev")
    with pytest.raises(Refusal, match="pictures in this process are for SD1, SD2, SDXL"):
        draw(backend, single(flux))
    inpainting = write(tmp_path / "inpainting.safetensors", "sd1-inpainting")
    with pytest.raises(Refusal, match="compare draws from text alone"):
        draw(backend, single(inpainting))
    unet = write(tmp_path / "unet.safetensors", "sd1", bare=True)
    with pytest.raises(Refusal, match="has no vae"):
        draw(backend, single(unet))
    for path, said in ((flux, "SD1, SD2, SDXL"), (inpainting, "text alone"), (unet, "no vae")):
        with plan.build(single(path)) as planned, pytest.raises(Refusal, match=said):
            backend.check(planned, [CAT])
    xl = write(tmp_path / "xl.safetensors", "sdxl")
    with plan.build(single(xl)) as planned:
        backend.check(planned, [CAT])
        with pytest.raises(Refusal, match=r"size 68x64: pictures of xl.safetensors are mult"):
            backend.check(planned, [CAT, Settings(width=68, height=64)])
    with pytest.raises(Refusal, match="unknown precision"):
        open_backend("diffusers", Options(device="cpu", precision="fp8"))


# --- samplers -----------------------------------------------------------------------------------

SCHEDULED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
             "beta_schedule": "scaled_linear"}  # fmt: skip


def schedulers():
    d, s = diffusers, SCHEDULED
    return {
        "euler": d.EulerDiscreteScheduler(**s, timestep_spacing="linspace"),
        "euler_a": d.EulerAncestralDiscreteScheduler(**s, timestep_spacing="linspace"),
        "ddim": d.DDIMScheduler(
            **s,
            timestep_spacing="leading",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        "unipc": d.UniPCMultistepScheduler(**s, solver_order=2, timestep_spacing="linspace"),
        "lcm": d.LCMScheduler(**s, set_alpha_to_one=False, clip_sample=False),
        "dpmpp_2m_karras": d.DPMSolverMultistepScheduler(
            **s, use_karras_sigmas=True, final_sigmas_type="zero", timestep_spacing="linspace"
        ),
    }


def wavy(x, sigma):
    bent = torch.tanh(x * 0.3) * 1.5 / (1 + 0.1 * sigma)
    return bent + 0.2 * torch.sin(x) * (sigma / (1 + sigma))


@pytest.mark.parametrize("steps", [4, 17, 30])
@pytest.mark.parametrize("name", ["euler", "euler_a", "ddim", "unipc", "lcm", "dpmpp_2m_karras"])
def test_samplers_are_those_of_diffusers(name, steps):
    """The same noise through diffusers' scheduler, which knows nothing of ours."""
    reference = schedulers()[name]
    generator = torch.Generator()

    def noise():
        return torch.randn((1, 4, 8, 8), generator=generator, dtype=torch.float64)

    generator.manual_seed(0)
    got = samplers.sample(name, wavy, noise, steps, samplers.schedule())
    generator.manual_seed(0)
    reference.set_timesteps(steps)
    plain = name in ("euler", "euler_a")  # x is x0 + sigma * noise; else scaled to unit variance
    x = noise() * (float(reference.sigmas[0]) if plain else 1.0)
    for i, t in enumerate(reference.timesteps):
        if name in ("ddim", "lcm"):
            kept = float(reference.alphas_cumprod[int(t)])
            sigma = ((1 - kept) / kept) ** 0.5
        else:
            sigma = float(reference.sigmas[i])
        reference.scale_model_input(x, t)
        latent = x if plain else x * (1 + sigma**2) ** 0.5
        predicted = (latent - wavy(latent, sigma)) / sigma
        more = {"generator": generator} if name in ("euler_a", "lcm") else {}
        x = reference.step(predicted, t, x, **more).prev_sample
    # DPM++ starts from sigma * noise here (k-diffusion), from unit variance there
    assert float((x - got).abs().max()) < (3e-3 if name == "dpmpp_2m_karras" else 2e-5)


# --- pictures depend on seed and settings alone -------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_sde"])
def test_pictures_do_not_depend_on_the_batch(sampler, pairs, backend):
    asked = [
        Settings(prompt, "bad", seed, 3, 7.0, sampler, 64, 64)
        for prompt, seed in (("a cat", 1), ("a dog", 2), ("a cat", 3))
    ]
    found = single(pairs["sd1"][0])
    alone = draw(backend, found, *asked)
    assert len({a.tobytes() for a in alone}) == 3
    assert same(draw(backend, found, *asked[::-1])[::-1], alone)
    for batch in (2, 3):
        many = open_backend("diffusers", Options(device="cpu", batch=batch))
        for got, want in zip(draw(many, found, *asked), alone, strict=True):
            assert np.abs(got.astype(int) - want).max() <= 1


def test_all_of_a_long_prompt_is_read(pairs, backend):
    found = single(pairs["sd1"][0])
    texts = ["cat " * 80, "cat " * 79 + "dog", "cat " * 75]
    made = [draw(backend, found, Settings(t, seed=1, steps=2, width=64, height=64)) for t in texts]
    assert not same(made[0], made[1])
    assert not same(made[0], made[2])


def test_guidance_1_is_no_guidance(pairs, backend):
    found = single(pairs["sd1"][0])
    one, other = (
        draw(backend, found, Settings("cat", negative, 1, 2, 1.0, "euler", 64, 64))
        for negative in ("", "bad")
    )
    assert same(one, other)


# --- a whole sheet ------------------------------------------------------------------------------


def run(*words):
    settings = () if words[0] == "--redo" else ("--steps", "2", "--size", "64x64")
    assert cli.run(["compare", "--device", "cpu", *settings, *words]) == 0


def test_a_sheet_stopped_and_gone_on_with_is_one_made_in_one_go(pairs, tmp_path):
    a, b = pairs["sd1"]
    words = ["--each", "A", "--each", "GRAD_V base=1 vae=b", "--each", "0.5", "--seeds", "1-2"]
    run(a, b, *words, "--prompt", "a cat", "-o", "whole.png")
    run(a, b, *words[:4], "--prompt", "a cat", "--seeds", "2", "-o", "part.png")
    run(a, b, *words, "--prompt", "a cat", "-o", "part.png", "--force")
    for name in ("png", "html"):
        one, other = ((tmp_path / f"{n}.{name}").read_text("latin-1") for n in ("whole", "part"))
        assert one.replace("whole", "part") == other
    cells = [json.loads((tmp_path / f"{n}.json").read_text())["cells"] for n in ("whole", "part")]
    assert [c["pixels"] for c in cells[0]] == [c["pixels"] for c in cells[1]]


def test_every_cell_is_drawn_again_alike(pairs, tmp_path, capsys):
    a, b = pairs["sdxl"]
    run(a, b, "--each", "0.5", "--each", "B", "--x", "sampler=ddim,lcm,dpmpp_sde", "-o", "s.png")
    for place in ("1,2", "2,3"):
        run("--redo", "s.json", "--cell", place, "-o", "again.png", "--force")
        assert "the same pixels" in capsys.readouterr().out


NO_EXTRA = """
import sys
for name in ("torch", "diffusers", "transformers", "PIL"):
    sys.modules[name] = None
from plymix.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_what_to_install_is_said(pairs):
    root = Path(plymix.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", NO_EXTRA, "compare", *pairs["sd1"], "-o", "s.png"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert 'pip install "plymix[images]"' in done.stderr
    assert not Path("s").exists()


def test_the_order_of_merges_is_no_matter(pairs, tmp_path):
    """Rows in any order give the same pictures, each."""
    a, b = pairs["sd1"]
    models = rows.Models(a, b)
    found = {}
    for each in (("A", "0.5", "B", "0.25 IN05=1"), ("0.25 IN05=1", "B", "A", "0.5")):
        known = grid.given(models, each, "1", ("cat",))
        made = grid.build(models, (), CAT, *grid.placed("", "", "", known))
        place = compare.place(tmp_path / f"{len(found)}.png", False)
        backend = open_backend("diffusers", Options(device="cpu"))
        with compare.Kitchen() as kitchen:
            done = compare.draw(made, kitchen, backend, "diffusers", place)
        found[len(found)] = dict(zip(each, (r["pixels"] for r in done.records), strict=True))
    assert found[0] == found[1]


def test_which_block_does_what(pairs, tmp_path):
    """Of two models that differ in one block, that block alone moves the picture."""
    from tiny import read_safetensors, write_safetensors

    made, values, _ = read_safetensors(Path(pairs["sd1"][0]))
    other = read_safetensors(Path(pairs["sd1"][1]))[1]
    keys = "model.diffusion_model.output_blocks.9."
    mixed = {k: other[k] if k.startswith(keys) else v for k, v in values.items()}
    b = write_safetensors(tmp_path / "b.safetensors", made, mixed)
    words = ["blocks", pairs["sd1"][0], str(b), "--device", "cpu", "--steps", "1", "--seeds", "1"]
    assert cli.run([*words, "--size", "64x64", "--sampler", "euler", "-o", "map.png"]) == 0
    told = json.loads((tmp_path / "map.json").read_text("utf-8"))
    moved = {m["block"]: m["structure"] for m in told["blocks"]}
    assert {name for name, far in moved.items() if far > 1e-9} == {"OUT09"}
    assert moved["OUT09"] == pytest.approx(told["whole"]["structure"], abs=1e-12)


# --- the pair that comes with plymix ------------------------------------------------------------

PAIR = Path(__file__).parent.parent / "demo" / "pair"
MERGES = ("A", "B", "0.5", "GRAD_A", "GRAD_V base=1 vae=b")
EMOJI = [
    Settings(f"a {thing}", "", seed=seed, steps=16, cfg=4, width=128, height=128)
    for thing in ("red apple", "penguin", "house")
    for seed in (1, 2)
]


@pytest.fixture(scope="module")
def sheet(tmp_path_factory, backend):
    """Row of the demo's experiment -> its pictures of EMOJI, float32 in 0..1."""
    folder = tmp_path_factory.mktemp("pair")
    a, b = PAIR / "emoji-shaded.safetensors", folder / "emoji-flat.safetensors"
    plymix.merge(a, a, b, alpha=0.0, unet=str(PAIR / "emoji-flat-unet.safetensors"))
    models = rows.Models(str(a), str(b))
    made = {row: draw(backend, rows.made(rows.split(row), models), *EMOJI) for row in MERGES}
    return {row: np.float32(pictures) / 255 for row, pictures in made.items()}


def borders(pictures):
    """The mean colour of what surrounds the things drawn."""
    edges = [pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]]
    return np.concatenate(edges, axis=1).mean((0, 1))


def apart(x, y):
    return float(np.sqrt(np.square(x - y).mean()))


def test_the_two_models_of_the_pair_differ_in_ground_and_drawing(sheet):
    white, blue = borders(sheet["A"]), borders(sheet["B"])
    assert white.min() > 0.95
    assert np.abs(blue - (0.78, 0.89, 0.97)).max() < 0.06
    assert apart(sheet["A"], sheet["B"]) > 0.2


def test_merges_of_the_pair_lie_between_and_differ(sheet):
    way = borders(sheet["B"]) - borders(sheet["A"])
    for row in MERGES[2:]:
        share = float((borders(sheet[row]) - borders(sheet["A"])) @ way / (way @ way))
        assert -0.1 < share < 1.1, row
        for one in "AB":
            assert apart(sheet[row], sheet[one]) > 0.05, (row, one)
    for i, row in enumerate(MERGES[2:]):
        for other in MERGES[3 + i :]:
            assert apart(sheet[row], sheet[other]) > 0.05, (row, other)


def test_prompts_of_the_pair_are_obeyed(sheet):
    """Pictures of one thing with two seeds are more alike than those of two things."""
    for one in "AB":
        things = sheet[one].reshape(3, 2, *sheet[one].shape[1:])
        small = things.reshape(3, 2, 16, 8, 16, 8, 3).mean((3, 5))
        for i in range(3):
            for k in range(3):
                if i != k:
                    assert apart(small[i, 0], small[i, 1]) < apart(small[i, 0], small[k, 1])
