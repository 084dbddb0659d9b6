import pytest
from omegaconf import OmegaConf

from sae_runner.commands import names
from sae_runner.commands.pipeline import Pipeline


def test_a_runs_own_record_gives_the_name_of_its_store(trained):
    (run,), (store,) = trained.glob("train/[!.]*"), trained.glob("stores/[!.]*")
    record = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    identity = names.store_identity(record["identity"], record["identity"]["store"])
    assert names.store_name(record["choices"], identity) == store.name


def test_names_follow_content_and_nothing_else(compose_job, small, trained):
    def paths(*words):
        job = compose_job("train", *small, f"outputs={trained}", *words)
        pipeline = Pipeline(job.cfg, job.choices)
        return pipeline.store_dir.name, pipeline.run_dir.name

    store, run = paths()
    assert (trained / "stores" / store).is_dir() and (trained / "train" / run).is_dir()
    assert paths("model.batch_size=7", "device=cpu", "trainer.log_every=9") == (store, run)
    assert paths("sae.k=3")[0] == store and paths("sae.k=3")[1] != run
    assert paths("store.prefetch=9") == (store, run)
    other = paths("dataset.seed=1")
    assert other[0] != store and other[1] != run


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "matching_pursuit"])
def test_width_and_k_under_either_name_are_one_run(kind, compose_job):
    def name(*words):
        job = compose_job("train", "model=toy", f"sae={kind}", *words)
        return Pipeline(job.cfg, job.choices).run_dir.name

    first = name("sae.expansion=2", "sae.k=8")
    assert name("sae.d_sae=128", "sae.expansion=null", "sae.k=8") == first
    assert name("sae.expansion=2", "sae.target_l0=8") == first
    assert name("sae.expansion=2", "sae.k=8", "sae.target_l0=8.0") == first
    assert name("sae.expansion=2", "sae.target_l0=9") != first
    assert name("sae.d_sae=129", "sae.expansion=null", "sae.k=8") != first


def test_a_target_is_no_k_where_a_penalty_leads_to_it(compose_job):
    jobs = [compose_job("train", "model=toy", "sae=relu", f"sae.target_l0={n}") for n in (8, 9)]
    assert len({Pipeline(job.cfg, job.choices).run_dir for job in jobs}) == 2
