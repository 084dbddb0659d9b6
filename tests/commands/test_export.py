"""`sae-run export`: the folder, its model card, what is refused, and the hub (a local folder)."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from sae_runner import load_report, load_sae
from sae_runner.checkpoint import find_checkpoint
from sae_runner.commands.eval import run_record
from sae_runner.commands.export import check, main
from sae_runner.errors import ConfigError, InputError, StoreError
from sae_runner.interchange import _hub, recognise

X = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
SAELENS = ("format=saelens", "hook_name=blocks.0.hook_resid_post")


@pytest.fixture
def run(outputs) -> Path:
    return next(outputs.glob("train/[!.]*"))


@pytest.fixture
def export(compose_job, outputs, tmp_path):
    """`export("format=saelens", …)` of a checkpoint, given or the run's; gives the folder."""

    def export(*words, checkpoint=None, out="exported"):
        checkpoint = checkpoint or next(outputs.glob("train/[!.]*"))
        job = compose_job("export", f"checkpoint={checkpoint}", f"out={tmp_path / out}", *words)
        check(job)
        main(job)
        return tmp_path / out

    return export


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "sparsify"])
def test_what_is_exported_computes_the_same(export, run, name):
    folder = export(f"format={name}", "hook_name=blocks.4.hook_resid_post")
    assert recognise(folder).name == name
    expected, found = load_sae(run)(X), load_sae(folder)(X)
    torch.testing.assert_close(found.x_hat, expected.x_hat)
    torch.testing.assert_close(found.latents.dense(), expected.latents.dense())


def test_the_folder_is_named_after_run_and_step(compose_job, outputs, run, capsys):
    words = ("format=sparsify", f"outputs={outputs}", f"checkpoint={run.name}")
    main(compose_job("export", *words))
    folder = outputs / "exports" / f"{run.name}-{find_checkpoint(run).name}-sparsify"
    assert capsys.readouterr().out.strip() == str(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "cfg.json", "figures", "sae.safetensors",
    ]  # fmt: skip


def test_how_it_was_trained_is_said_where_there_is_a_place(export, run):
    folder = export("format=dictionary_learning", "hook_name=resid_post_layer_4")
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    record = run_record(run)
    assert trainer["lr"] == record["trainer"]["lr"] and trainer["seed"] == record["seed"]
    assert trainer["steps"] == 8 and trainer["lm_name"] == "toy" and trainer["layer"] == 4


def test_one_format_becomes_another(export, run, tmp_path):
    first = export(*SAELENS, out="first")
    second = export("format=dictionary_learning", checkpoint=first, out="second")
    trainer = json.loads((second / "config.json").read_text())["trainer"]
    assert trainer["submodule_name"] == "resid_post_layer_0" and trainer["lm_name"] == "toy"
    third = export("format=saelens", checkpoint=second, out="third")
    assert json.loads((third / "cfg.json").read_text())["metadata"]["hook_name"] == (
        "blocks.0.hook_resid_post"
    )
    torch.testing.assert_close(load_sae(third)(X).x_hat, load_sae(run)(X).x_hat)
    assert "## Metrics" not in (third / "README.md").read_text()


# -- Model card ----------------------------------------------------------------------------------


def test_the_card_shows_metrics_and_figures(export, run):
    folder = export(*SAELENS)
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "saelens" and "sparse-autoencoder" in header["tags"]
    report = load_report(run)
    fvu = report["evaluators"]["reconstruction"]["metrics"]["reconstruction"]["fvu"]
    (shown,) = re.findall(r"\| reconstruction\.fvu \| ([\d.]+)", text)
    assert float(shown) == pytest.approx(fvu, abs=5e-3)
    assert "Measured on 300 rows of toy (heldout)" in text
    figures = re.findall(r"!\[\w+\]\((.+?)\)", text)
    assert len(figures) >= 3
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert 'SAE.load_from_disk("FOLDER")' in text and "type: topk" in text


def test_without_a_report_the_card_says_what_is_known(export, run):
    (run / "report.json").unlink()
    text = (export(*SAELENS) / "README.md").read_text()
    assert "## Metrics" not in text and "| architecture | topk |" in text


def test_a_card_of_an_earlier_checkpoint_has_none_of_the_last_ones_figures(export, run):
    last = find_checkpoint(run)
    shutil.copytree(last, last.parent / "step_00000003")
    folder = export(*SAELENS, checkpoint=last.parent / "step_00000003")
    assert not (folder / "figures").exists()
    assert "## Metrics" not in (folder / "README.md").read_text()


# -- What is refused -----------------------------------------------------------------------------


def test_a_folder_is_only_replaced_with_force_and_if_it_is_an_export(export, tmp_path):
    folder = export(*SAELENS)
    before = (folder / "cfg.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"exported is there already: force=true replaces it"):
        export(*SAELENS)
    assert (folder / "cfg.json").stat().st_mtime_ns == before
    export(*SAELENS, "force=true")
    assert (folder / "cfg.json").stat().st_mtime_ns > before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    with pytest.raises(ConfigError, match="precious holds no saelens SAE: it is not replaced"):
        export(*SAELENS, "force=true", out="precious")
    assert (tmp_path / "precious" / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "'format' needs a value. Choose from"),
        (("format=sealens",), "format=sealens: no such format. Did you mean 'saelens'?"),
        (("format=saelens",), "site activations is no hook of TransformerLens"),
        (("format=saelens", "push_to=hf:me/it"), "push_to=hf:me/it: set HF_TOKEN"),
        (("format=saelens", "push_to=me/it"), "push_to=me/it: expected hf:org/repo"),
    ],
)
def test_bad_input_is_said_and_nothing_is_made(export, tmp_path, monkeypatch, words, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)[:60]):
        export(*words)
    assert set(tmp_path.rglob("*")) == before


def test_a_write_that_fails_leaves_nothing(export, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae_runner.commands.export.model_card", fail)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space"):
        export(*SAELENS)
    assert set(tmp_path.rglob("*")) == before


# -- The hub, played by a folder -----------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """`hub/org/repo` is a repository; what is downloaded or uploaded is copied."""
    root = tmp_path / "hub"

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        source = root / repo_id
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no repository {repo_id}\nmore")
        target = tmp_path / "cache" / (revision or "main")
        for path in (p for p in source.rglob("*") if p.is_file()):
            name = str(path.relative_to(source))
            if any(Path(name).match(p) and p.count("/") == name.count("/") for p in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)

    def create_repo(repo_id, *, token, private, exist_ok):
        assert exist_ok and token == "secret"
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        (root / f"{repo_id}.private").write_text(str(private))

    def upload_folder(*, repo_id, folder_path, path_in_repo, revision, commit_message, token):
        assert token == "secret" and "topk" in commit_message
        shutil.copytree(folder_path, root / repo_id / (path_in_repo or ""), dirs_exist_ok=True)
        return f"https://hub/{repo_id}/{path_in_repo or ''}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return root


def test_what_is_pushed_can_be_loaded_by_its_name(export, run, hub, capsys):
    export(*SAELENS, "push_to=hf:me/saes/toy/l0")
    assert capsys.readouterr().out.split()[-1] == "https://hub/me/saes/toy/l0"
    assert (hub / "me" / "saes.private").read_text() == "True"
    assert (hub / "me/saes/toy/l0/README.md").is_file()
    expected = load_sae(run)(X)
    for name in ("hf:me/saes/toy/l0", "hf:me/saes/toy/l0@v1"):
        torch.testing.assert_close(load_sae(name)(X).x_hat, expected.x_hat)


def test_only_the_files_of_that_path_are_downloaded(export, hub, tmp_path):
    export(*SAELENS, "push_to=hf:me/saes/a", "private=false")
    assert (hub / "me" / "saes.private").read_text() == "False"
    shutil.copytree(hub / "me/saes/a", hub / "me/saes/b")
    load_sae("hf:me/saes/b")
    found = sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert found == ["cfg.json", "sae_weights.safetensors"]
    assert not (tmp_path / "cache/main/a").exists()


def test_our_own_checkpoints_are_found_on_the_hub(run, hub):
    shutil.copytree(find_checkpoint(run), hub / "me/saes/own")
    torch.testing.assert_close(load_sae("hf:me/saes/own")(X).x_hat, load_sae(run)(X).x_hat)


def test_a_repository_may_be_one_sae(export, run, hub):
    export("format=sparsify", "push_to=hf:me/sae")
    torch.testing.assert_close(load_sae("hf:me/sae")(X).x_hat, load_sae(run)(X).x_hat)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:me/absent/x", "checkpoint=hf:me/absent/x: no repository me/absent"),
        ("hf:me/saes/absent", "checkpoint=hf:me/saes/absent: there is no SAE at that path"),
        ("hf:me", "checkpoint=hf:me: expected hf:org/repo/path"),
        ("hf:me/saes/../x", "expected hf:org/repo/path"),
    ],
)
def test_what_is_not_there_is_one_line(hub, name, message):
    (hub / "me/saes").mkdir(parents=True)
    with pytest.raises(StoreError, match=re.escape(message)) as caught:
        load_sae(name)
    assert "\n" not in str(caught.value)


def test_a_hub_that_refuses_is_one_line(export, hub, monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.HfHubHTTPError("403: no rights\ndetails", response=Refusal())

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(StoreError, match="push_to=hf:me/saes: 403: no rights"):
        export(*SAELENS, "push_to=hf:me/saes")


class Refusal:
    request = None

    def __init__(self):
        self.headers = {}


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:org/repo", ("org/repo", "", None)),
        ("hf:org/repo/a/b.c", ("org/repo", "a/b.c", None)),
        ("hf:org/repo/a@main", ("org/repo", "a", "main")),
        ("hf:org/repo@v1.0", ("org/repo", "", "v1.0")),
    ],
)
def test_parts_of_a_name_on_the_hub(spec, parts):
    assert tuple(_hub.parse(spec, "checkpoint")) == parts
