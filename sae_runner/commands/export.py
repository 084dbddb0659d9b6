"""`sae-run export`: write an SAE as another library does, with a model card; upload it if asked."""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_runner import files
from sae_runner.checkpoint import find_checkpoint, load_sae, read_facts, step_dirs
from sae_runner.commands.eval import asked_checkpoint, run_record
from sae_runner.commands.job import Job
from sae_runner.config import construct
from sae_runner.errors import ConfigError, StoreError, did_you_mean
from sae_runner.interchange import FORMATS, _hub
from sae_runner.interchange.base import Format, Origin
from sae_runner.log import working
from sae_runner.report.assemble import report_path
from sae_runner.report.card import model_card
from sae_runner.report.schema import load_report

log = logging.getLogger("sae_runner")


class ExportOptions(NamedTuple):
    """What configs/export.yaml sets."""

    checkpoint: str | None
    format: str | None
    out: Path | None
    hook_name: str | None
    push_to: str | None
    private: bool
    outputs: Path
    force: bool

    @classmethod
    def from_config(
        cls, *, checkpoint: str | None, format: str | None, out: str | None, hook_name: str | None,
        push_to: str | None, private: bool, outputs: str, force: bool,
    ) -> "ExportOptions":  # fmt: skip
        """Typed.

        Raises:
            ConfigError: there is no such format, or no token to upload with.
        """
        names = FORMATS.names()
        if format not in names:
            what = (
                "'format' needs a value" if format is None else f"format={format}: no such format"
            )
            raise ConfigError(f"{what}.{did_you_mean(format or '', names)}")
        if push_to is not None:
            _hub.require_token(push_to)
        return cls(
            checkpoint, format, Path(out).expanduser() if out else None, hook_name, push_to,
            private, Path(outputs).expanduser(), force,
        )  # fmt: skip


def check(job: Job) -> None:
    """Refuse what can be refused ahead."""
    construct(ExportOptions.from_config, job.cfg, where="")


def main(job: Job) -> None:
    """Write the folder, print its path, upload it.

    Raises:
        InputError: no checkpoint there, the format has no such SAE, a folder is in the way.
    """
    options: ExportOptions = construct(ExportOptions.from_config, job.cfg, where="")
    out, kind = write(job, options)
    print(out)
    if options.push_to:
        message = f"{kind} SAE exported by sae-run"
        with working("uploading"):
            address = _hub.push(out, options.push_to, private=options.private, message=message)
        print(address)


@working("export")
def write(job: Job, options: ExportOptions) -> tuple[Path, str]:
    """The folder that was written, and the kind of SAE in it."""
    known: Format = FORMATS[str(options.format)]()
    folder = find_checkpoint(asked_checkpoint(job))
    facts, sae = read_facts(folder), load_sae(folder)
    origin = origin_of(facts, folder, options.hook_name)
    contents = known.contents(sae, origin)
    out = options.out or options.outputs / "exports" / f"{label(facts, folder)}-{known.name}"
    check_place(out, known, options)
    with files.atomic(out) as temporary:
        temporary.mkdir()
        known.save(temporary, contents)
        figures = copy_figures(facts, folder, temporary)
        card = model_card(facts, report_of(facts, folder), known.name, known.usage, figures)
        files.write_text(temporary / "README.md", card)
    return out, sae.kind


def label(facts: Mapping[str, Any], folder: Path) -> str:
    """The run and the step of a checkpoint, or the name of another library's folder."""
    name = folder.name if "format" in facts else f"{folder.parent.parent.name}-{folder.name}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def check_place(out: Path, known: Format, options: ExportOptions) -> None:
    """Refuse to write over a folder, or where nothing can be written.

    Raises:
        ConfigError: there is one, and `force` was not given, or it is no export of this format.
    """
    if out.exists():
        if not options.force:
            raise ConfigError(f"out={out} is there already: force=true replaces it")
        if not (out.is_dir() and known.recognises(out)):
            raise ConfigError(f"out={out} holds no {known.name} SAE: it is not replaced")
    files.require_writable(out.parent)


def origin_of(facts: Mapping[str, Any], folder: Path, hook_name: str | None) -> Origin:
    """Where the SAE reads and how it was trained, as far as its checkpoint and its run say."""
    if "format" in facts:
        origin = Origin(**facts["origin"])
        if hook_name is None:  # Each library has names of its own: ours is what they share.
            return origin._replace(hook=None if origin.site else origin.hook)
        return origin._replace(hook=hook_name, metadata={})
    model, dataset, training = facts.get("model") or {}, facts.get("dataset") or {}, {}
    if (folder.parent.parent / "config.yaml").is_file():
        record = run_record(folder.parent.parent)
        trainer = record.get("trainer") or {}
        training = {
            "lr": trainer.get("lr"), "batch_size": trainer.get("batch_size"),
            "seed": record.get("seed"), "steps": facts["step"],
        }  # fmt: skip
    weights = str(model.get("weights") or "")
    on_hub = model.get("type") == "transformer_lens" and not re.search(r"^package:|^[./~]", weights)
    return Origin(
        model=weights if on_hub and weights else model.get("name"),
        site=facts.get("site"),
        hook=hook_name,
        dataset=dataset.get("name"),
        context=model.get("context"),
        training=training,
    )


def report_of(facts: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The report of a checkpoint, if it was evaluated."""
    if "format" in facts:
        return None
    run_dir = folder.parent.parent
    for last in (True, False):
        path = report_path(run_dir, folder.name, last=last)
        try:
            report = load_report(path)
        except StoreError as error:
            if path.is_file():
                log.warning("%s", error)
            continue
        if report["run"]["checkpoint"] == folder.name:
            return report
    log.info("no report of %s: the model card has no metrics", folder)
    return None


def copy_figures(facts: Mapping[str, Any], folder: Path, out: Path) -> list[str]:
    """Copy the run's figures, which are of its last checkpoint; gives their names."""
    run_dir = folder.parent.parent
    if "format" in facts or not step_dirs(run_dir) or step_dirs(run_dir)[-1] != folder:
        return []
    figures = sorted((run_dir / "figures").glob("*.png"))
    for figure in figures:
        (out / "figures").mkdir(exist_ok=True)
        shutil.copyfile(figure, out / "figures" / figure.name)
    return [f"figures/{figure.name}" for figure in figures]
