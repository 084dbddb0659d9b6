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
