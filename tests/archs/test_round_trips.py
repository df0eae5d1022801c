"""There and back: what plymix wrote in diffusers' names gets the names it had before."""

import pytest
from test_archs import MODELS, expected, spelled

import plymix
from plymix import respelling
from small import data, load, save
from tiny import UNET, golden, header, state, write_safetensors

WITHOUT_TABLE = "anima"
LOST = {  # denoiser tensors that the classes of diffusers do not have, from their code
    "lumina2": ("norm_final.weight",),
    "z-image": ("norm_final.weight",),
    "pixart": ("y_embedder.y_embedding", "pos_embed"),
    "cosmos2": (
        "pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range",
        "accum_iteration", "accum_video_sample_counter", "accum_image_sample_counter",
        "accum_train_in_hours",
    ),
}  # fmt: skip


def round_trip(tmp_path, path, out="theirs.safetensors"):
    """{key: bytes} of a file that went to diffusers' names and back."""
    plymix.convert(path, tmp_path / out, layout="diffusers", force=True)
    plymix.convert(tmp_path / out, tmp_path / "back.safetensors", layout="ldm", force=True)
    return data(tmp_path / "back.safetensors")


@pytest.mark.parametrize("prefix", ["", UNET, "net."])
@pytest.mark.parametrize("model", [m for m in MODELS if expected(m)[0] != WITHOUT_TABLE])
def test_denoisers(model, prefix, tmp_path):
    made = spelled(header(model, full_width=model == "lumina2"), prefix)
    if model == "lumina2":  # its q, k and v are of unequal size
        made = {k: (d, tuple(n if n % 32 else n // 32 for n in s)) for k, (d, s) in made.items()}
    path = write_safetensors(tmp_path / "a.safetensors", made, state(made))
    lost = {prefix + key for key in LOST.get(expected(model)[0], ())}
    want = {key: value for key, value in data(path).items() if key not in lost}
    assert round_trip(tmp_path, path) == want
    names = load(tmp_path / "theirs.safetensors")[0].keys()
    assert not any(name.startswith(UNET) for name in names)


FULL = [model for model in MODELS if expected(model)[0] in ("sd1", "sd2", "sdxl", "sd3", "flux1")]


@pytest.mark.parametrize("model", FULL)
def test_checkpoints_in_a_folder(model, tmp_path):
    """Other spellings than plymix's: the VAE's and the norms' of Flux, the VAE's of SD3."""
    made = {
        ("first_stage_model." if key.startswith("vae.") else "")
        + key.removeprefix("vae.").replace("_norm.scale", "_norm.weight"): value
        for key, value in header(model).items()
    }
    if model == "sd3.5-medium":
        made = {k.replace("first_stage_model.", "vae."): v for k, v in made.items()}
    path = write_safetensors(tmp_path / "a.safetensors", made, state(made))
    back, want = round_trip(tmp_path, path, "folder"), data(path)
    assert back.keys() <= want.keys()
    lost = {key for key in want if key not in back}
    assert all(golden_component(model, key) in ("clip_h", "clip_g", "schedule", "") for key in lost)
    assert {key: want[key] for key in back} == back


def golden_component(model, key):
    """The golden component of a key; "" for position ids."""
    return "" if key.endswith("position_ids") else golden(model)[key][2]


def test_a_merge_in_between_and_a_second_trip(tmp_path):
    """The base's habits stay with results in diffusers' names."""
    made = spelled(header("wan2.1-t2v-1.3b"), "")
    one, two = (
        write_safetensors(tmp_path / f"{n}.safetensors", made, state(made, n)) for n in (1, 2)
    )
    plymix.convert(one, tmp_path / "theirs.safetensors", layout="diffusers")
    plymix.merge(tmp_path / "theirs.safetensors", two, tmp_path / "mix.safetensors", alpha=0.25)
    assert "scale_shift_table" in data(tmp_path / "mix.safetensors")
    plymix.merge(one, two, tmp_path / "want.safetensors", alpha=0.25)
    want = data(tmp_path / "want.safetensors")
    assert round_trip(tmp_path, tmp_path / "mix.safetensors") == want
    assert respelling.NAMES_KEY not in load(tmp_path / "back.safetensors")[1]


def test_names_that_are_no_habits_are_not_believed(tmp_path):
    """What a file says of itself gives its tensors no names that mean something else."""
    made = spelled(header("wan2.1-t2v-1.3b"), "")
    path = write_safetensors(tmp_path / "a.safetensors", made, state(made))
    plymix.convert(path, tmp_path / "theirs.safetensors", layout="diffusers")
    tensors = load(tmp_path / "theirs.safetensors")[0]
    want = {UNET + key: value for key, value in data(path).items()}
    for text in ('{"model.": "first_stage_model."}', "[1]", '{"a": 1}', "{", '{"": "../"}'):
        save(tmp_path / "theirs.safetensors", tensors, {respelling.NAMES_KEY: text})
        plymix.convert(
            tmp_path / "theirs.safetensors", tmp_path / "o.safetensors", layout="ldm", force=True
        )
        assert data(tmp_path / "o.safetensors") == want
