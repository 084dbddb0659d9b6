"""What was typed: made ready for Hydra, or refused in one line where Hydra answers with a page.

Everything here changes or reads `sys.argv` after the sub-command has been taken off it.
"""

import argparse
import re
import sys
from collections.abc import Sequence

from sae_runner.commands.job import IMPLIED
from sae_runner.config import options_of
from sae_runner.errors import ConfigError, did_you_mean

VALUED = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn")
"""Hydra's own options with a value: what follows them is no path and no override."""
LONGEST_WORD = 4096
"""Characters of an override: as long as a path may be."""
QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
PLAIN = r"\w\s/\-\\+.$%*@?|:"
"""What Hydra's grammar takes without quotes; of letters, only those of ASCII."""
FOREIGN = re.compile(rf"""[^,\[\]{{}}()='"]*[^{PLAIN},\[\]{{}}()='"][^,\[\]{{}}()='"]*""", re.ASCII)
"""A value, or an item of a list or sweep, that holds a character beyond these."""


def take_words() -> list[str]:
    """Take run directories and globs off the command line."""
    words = sys.argv[1:]
    plain: list[str] = []
    kept = [sys.argv[0]]
    for before, word in zip(["", *words], words, strict=False):
        is_path = not word.startswith(("-", "+", "~")) and "=" not in word
        (plain if is_path and before not in VALUED else kept).append(word)
    sys.argv[:] = kept
    return plain


def add_width_override() -> None:
    """Let `sae.d_sae=` stand for the width alone: the default is an expansion."""
    given = {m[1] for word in sys.argv if (m := re.match(r"\+*sae\.(d_sae|expansion)=", word))}
    if given == {"d_sae"}:
        sys.argv.append(IMPLIED)


def add_sweep_folder(command: str) -> None:
    """Let `outputs=` move what Hydra keeps of a sweep where the config cannot say so itself."""
    given = [word.partition("=")[2] for word in sys.argv if word.startswith("outputs=")]
    if command == "eval" and given and not any("hydra.sweep.dir=" in word for word in sys.argv):
        sys.argv.append(f"hydra.sweep.dir={given[-1]}/sweeps")


def put_flags_first() -> None:
    """Let `-m` and `--cfg job` stand anywhere: Hydra's parser takes overrides in one piece only."""
    words = sys.argv[1:]
    first, rest = list[str](), list[str]()
    for before, word in zip(["", *words], words, strict=False):
        (first if word.startswith("-") or before in VALUED else rest).append(word)
    if words and words[-1] in VALUED:  # Its value is missing: no override is to be taken for one.
        rest.append(first.pop())
    sys.argv[1:] = first + rest


def quote_values() -> None:
    """Let a value have any character, as paths do: Hydra's grammar wants quotes around most."""
    words = sys.argv[1:]
    sys.argv[1:] = [
        quoted(word) if before not in VALUED else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def leave_to_jobs() -> None:
    """In a sweep over a group, give what is set below that group to the jobs alone.

    Hydra also composes a config for the sweep as a whole, with the group's default option, which
    need not have the keys: `-m sae=jump_relu,gated` is of jobs, and `sae.bandwidth=1` of them too.
    """
    if not {"-m", "--multirun"} & set(sys.argv):
        return
    swept = [word.partition("=") for word in sys.argv if re.match(r"[\w/]+=[^=]*,", word)]
    groups = tuple(f"{key.replace('/', '.')}." for key, _, _ in swept if options_of(key))
    for place, word in enumerate(sys.argv):
        key, equals, value = word.partition("=")
        if groups and equals and key.lstrip("+").startswith(groups) and is_one(value):
            sys.argv[place] = f"{key}=choice({value})"


def is_one(value: str) -> bool:
    """Whether a value is no sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return not OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:  # Which is said when it is taken.
        return False


def quoted(word: str) -> str:
    """An override whose value, or the items of whose value, are in quotes where they need them."""
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    if "${" in value:  # What it stands for belongs to the text around it.
        bare = not QUOTED.search(value) and FOREIGN.search(re.sub(r"\$\{[^}]*\}", "", value))
        return f"{key}={in_quotes(value)}" if bare else word
    parts = QUOTED.split(value)  # Every second one is in quotes already.
    parts[::2] = [FOREIGN.sub(lambda match: in_quotes(match[0]), part) for part in parts[::2]]
    return f"{key}={''.join(parts)}"


def in_quotes(text: str) -> str:
    """`'text'`, and the space around it outside; of a dict's item only the value."""
    match = re.fullmatch(r"(\s*(?:\w+:\s*)?)(.*?)(\s*)", text, re.ASCII | re.DOTALL)
    assert match
    return f"{match[1]}'{match[2]}'{match[3]}"


def check_words(words: Sequence[str]) -> None:
    """Refuse in one line what Hydra answers with a page or a traceback.

    Raises:
        ConfigError: a flag that there is none of, a word that is no override, or a group that is
            left without an option.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        known, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    if unknown:
        raise ConfigError(f"no flag {unknown[0]!r}.{did_you_mean(unknown[0], flags())}")
    for word in known.overrides:
        if word.startswith("="):
            raise ConfigError(f"{word!r}: no key before the =")
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"{word!r}: expected key=value or group=option")
        if len(word) > LONGEST_WORD:
            raise ConfigError(f"{word[:40]!r}…: {len(word):,} characters are no override")
        group, _, value = word.lstrip("+").partition("=")
        if "null" in value.split(",") and (options := options_of(group)):
            raise ConfigError(f"{group}=null: needs one of {', '.join(options)}")


def flags() -> list[str]:
    """Hydra's own flags, spelled out."""
    from hydra._internal.utils import get_args_parser

    actions = get_args_parser()._actions
    return [action.option_strings[0] for action in actions if action.option_strings]
