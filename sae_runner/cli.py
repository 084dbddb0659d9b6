"""The `sae-run` command: one sub-command per pipeline step, each an ordinary Hydra application."""

import contextlib
import importlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sae_runner.commands.job import Job

COMMANDS = {
    "train": "cache, train and evaluate what a composition describes; skips what is done",
    "cache": "run a model once and write activations of one or many sites",
    "eval": "measure a checkpoint on held-out data (checkpoint=RUN)",
    "export": "write an SAE for SAELens, dictionary_learning or sparsify; upload it",
    "report": "compare runs: table, CSV, Markdown, one HTML page (RUN … or globs)",
    "plan": "say what a composition would do and cost, writing nothing",
    "sites": "list the sites of a model, without its weights",
    "ls": "show stores, runs, models that were trained here, reports",
    "rm": "remove any of these, never what something else needs",
}
TAKES_PATHS = ("report", "ls", "rm")
"""Commands whose words without `=` are run directories or globs."""
ANSWERS = ("plan", "sites", "report", "ls", "rm")
"""Commands that only say something: a sweep of them takes neither a launcher nor a folder."""


class Outcome:
    """What the jobs of this process came to: read by `main` once Hydra is through."""

    words: Sequence[str] = ()
    failures: list[Exception]


outcome = Outcome()


def main() -> None:
    """Dispatch `sae-run COMMAND ...`; everything after the command belongs to Hydra."""
    try:
        dispatch()
    except BrokenPipeError:
        unheard()


def unheard() -> NoReturn:
    """End quietly when nobody reads on (`sae-run … | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def dispatch() -> None:
    """Find the command, compose and check every job of it, run it; errors become exit codes."""
    if "-sc" in sys.argv:
        return complete()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return print(usage())
    if sys.argv[1] == "--version":
        from sae_runner import __version__

        return print(__version__)
    command = sys.argv.pop(1)

    from sae_runner.errors import Interrupted, did_you_mean

    if command not in COMMANDS:
        stop(f"sae-run: no command {command!r}.{did_you_mean(command, COMMANDS)}", 2)
    from sae_runner import command_line

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises; this function prints.
    outcome.failures = []
    outcome.words = command_line.take_words() if command in TAKES_PATHS else ()
    command_line.add_width_override()
    command_line.add_sweep_folder(command)
    command_line.put_flags_first()
    command_line.quote_values()
    command_line.leave_to_jobs()
    try:
        command_line.check_words(sys.argv[1:])
        if {"-h", "--help"} & set(sys.argv):
            from sae_runner.composition import help_page

            return print(help_page(command, sys.argv[1:]))
        jobs = preflight(command)
        if jobs and command in ANSWERS:
            answer(command, jobs)
        else:
            hydra_app(command)()
    except (KeyboardInterrupt, Interrupted) as error:
        from sae_runner.log import foot

        foot.end()  # The signal may have come just before the block that would have done it.
        code = error.exit_code if isinstance(error, Interrupted) else 130
        message = f"sae-run {command}: {error or 'interrupted: type the same command to go on'}"
        if any(thread.name == "prefetch" for thread in threading.enumerate()):
            # A thread inside torch cannot be ended, and the interpreter would die of it.
            print(message, file=sys.stderr, flush=True)
            os._exit(code)
        stop(message, code)
    except BrokenPipeError:
        raise
    except Exception as error:
        fail(command, error)
    if outcome.failures:
        sys.exit(max(exit_code(error) for error in outcome.failures))


def fail(command: str, error: Exception) -> None:
    """End the process with one line if the error has one, else with a traceback."""
    from sae_runner.explain import explain

    if error in outcome.failures:  # Said when it happened.
        sys.exit(exit_code(error))
    if message := explain(error, command):
        stop(f"sae-run {command}: {message}", exit_code(error))
    traceback.print_exception(without_hydra_frames(error))
    sys.exit(1)


def exit_code(error: Exception) -> int:
    """2 for what the user gave, 1 for what went wrong."""
    from sae_runner.explain import is_bad_input

    return 2 if is_bad_input(error) else 1


def stop(message: str, code: int) -> None:
    """Print one line on standard error and exit."""
    print(message, file=sys.stderr)
    sys.exit(code)


def hydra_app(command: str) -> Callable[[], Any]:
    """The Hydra application of one sub-command: `configs/<command>.yaml` and `run`."""
    import hydra

    from sae_runner.config import config_dir

    app: Callable[[], Any] = hydra.main(
        version_base="1.3", config_path=config_dir(), config_name=command
    )(run)
    return app


def preflight(command: str) -> "list[Job]":
    """Compose and check every job of a sweep before the first one starts or makes a directory."""
    words = sys.argv[1:]
    sweeps = {"-m", "--multirun"} & set(words) or any("experiment=" in w for w in words)
    if not sweeps or {"--cfg", "-c", "--info", "-i", "--hydra-help"} & set(words):
        return []
    from sae_runner.composition import composed_jobs
    from sae_runner.errors import InputError
    from sae_runner.log import Progress

    module = module_of(command)
    check: Any = getattr(module, "check", None)
    jobs = composed_jobs(command, words)
    for job in jobs if outcome.words else []:
        job.cfg["runs"] = list(outcome.words)
    with Progress("check", len(jobs), "jobs") as progress:
        for job in jobs if check else []:
            try:
                check(job)
            except InputError as error:
                which = f" (in {', '.join(job.overrides)})" if len(jobs) > 1 else ""
                raise type(error)(f"{error}{which}") from None
            progress.advance(1)
    if together := getattr(module, "check_sweep", None):
        together(jobs)
    return jobs


def module_of(command: str) -> Any:
    """The command's module; this is where torch is first imported."""
    from sae_runner.allocator import keep_pages
    from sae_runner.log import working

    keep_pages()
    with working("starting"):
        return importlib.import_module(f"sae_runner.commands.{command}")


def answer(command: str, jobs: "Sequence[Job]") -> None:
    """Run the jobs of a sweep in this process, under their overrides."""
    from sae_runner.log import setup_logging
    from sae_runner.signals import raise_on_signals

    setup_logging()
    raise_on_signals()
    module = module_of(command)
    for i, job in enumerate(jobs):
        if i > 0:
            print()
        if len(jobs) > 1:
            print(f"# {' '.join(job.overrides)}", flush=True)
        module.main(job)


def run(cfg: "DictConfig") -> None:
    """Hydra's task function."""
    from hydra.core.hydra_config import HydraConfig

    from sae_runner.commands.job import typed
    from sae_runner.log import setup_logging
    from sae_runner.signals import raise_on_signals

    hydra = HydraConfig.get()
    setup_logging()
    raise_on_signals()
    command = str(hydra.job.name)
    try:
        module_of(command).main(job_of(cfg))
    except BrokenPipeError:
        unheard()  # Here already: Hydra would report it.
    except Exception as error:
        from sae_runner.explain import explain

        message = explain(error, command)
        if not message or "basic" not in str(hydra.launcher.get("_target_", "basic")):
            raise  # Other launchers run jobs elsewhere: only an exception tells them.
        outcome.failures.append(error)
        sweep = "MULTIRUN" in str(hydra.mode)
        which = f" ({', '.join(typed(hydra.overrides.task))})" if sweep else ""
        print(f"sae-run {command}{which}: {message}", file=sys.stderr)


def run_together(command: str, cfgs: "Sequence[DictConfig]", memory_gb: float | None) -> None:
    """Run the jobs of a `train` sweep over shared batches; each failure is one line."""
    from sae_runner.composition import job_of_composed
    from sae_runner.errors import ConfigError
    from sae_runner.explain import explain
    from sae_runner.log import setup_logging
    from sae_runner.signals import raise_on_signals

    setup_logging()
    raise_on_signals()
    if command != "train":
        raise ConfigError(f"hydra/launcher=together: {command} has no batches to share; use basic")
    together = module_of("together")
    jobs = [job_of_composed(cfg) for cfg in cfgs]
    for job, error in zip(jobs, together.main(jobs, memory_gb), strict=True):
        if error is not None:
            outcome.failures.append(error)
            message = explain(error)
            if not message:
                traceback.print_exception(error)
            which = f"({', '.join(job.overrides)})"
            print(f"sae-run {command} {which}: {message or error!r}", file=sys.stderr)


def job_of(cfg: "DictConfig") -> "Job":
    """The job that Hydra is running."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from sae_runner.commands.job import Job, chosen, typed

    hydra = HydraConfig.get()
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    if outcome.words:
        values["runs"] = list(outcome.words)
    return Job(values, chosen(hydra.runtime.choices), typed(hydra.overrides.task))


def complete() -> None:
    """Answer the shell: install completion, or say what could stand in place of the last word."""
    if "query=bash" not in sys.argv:
        hydra_app("train")()
        return
    from sae_runner.completion import candidates

    line = os.environ.get("COMP_LINE", "sae-run train ")
    print(" ".join(candidates(line, COMMANDS, TAKES_PATHS, ask_hydra)))


def ask_hydra(command: str, words: Sequence[str]) -> list[str]:
    """What Hydra offers for the last of the words after a command."""
    os.environ["COMP_LINE"] = " ".join(["sae-run", *words])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        hydra_app(command if command in COMMANDS else "train")()
    return said.getvalue().split()


def usage() -> str:
    """The text of `sae-run --help`, without importing Hydra."""
    rows = "\n".join(f"  {name:<8}{purpose}" for name, purpose in COMMANDS.items())
    return f"""usage: sae-run COMMAND [group=option] [key=value] [-m] [--help]

{rows}

  sae-run train                                     the embedded default, in minutes
  sae-run train model=clip_vit_l sae=topk sae.k=64  compose a run
  sae-run train -m sae=topk,relu sae.expansion=4,8  a sweep
  sae-run train --help                              groups, options and defaults
  eval "$(sae-run -sc install=bash)"                tab completion"""


def without_hydra_frames(error: Exception) -> Exception:
    """The error with a traceback that starts at `run`."""
    frames = error.__traceback__
    while frames and frames.tb_frame.f_code is not run.__code__:
        frames = frames.tb_next
    return error.with_traceback(frames or error.__traceback__)
