"""A language model that explains latents of text and judges its own explanations.

It is asked, at temperature 0, in the words of `_prompts`:

- explain: what do marked tokens of the examples share? Marked are those above 0.3 of the
  latent's strongest activation (`_excerpts`);
- detect: which of some whole excerpts, without marks, in a drawn order, fit the explanation?
- fuzz: of excerpts in which the latent is active, in half of which the marks are moved to as many
  tokens (the mean, rounded up) on which it is not: where are the marks right?
- simulate: 0 to 10 for each token of an excerpt, which is what the correlations are of.

A reply that cannot be understood counts as wrong for all that it was asked about (`n_unparsed`);
where that is every reply, or no reply comes, the latent stays without a score.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from sae_runner.config import NonNegative, NonNegativeFloat, Positive, PositiveFloat
from sae_runner.errors import ConfigError
from sae_runner.evaluators._explainers import EXPLAINERS, _prompts
from sae_runner.evaluators._explainers._asking import Asking, Unparsed, tokens
from sae_runner.evaluators._explainers._endpoint import Endpoint, Speaker, Unanswered
from sae_runner.evaluators._explainers._excerpts import (
    ORDER,
    drawn,
    explained_excerpts,
    marked_excerpts,
    window_of,
)
from sae_runner.evaluators._explainers._local import Local, folder_of, identity_of
from sae_runner.evaluators._explainers.base import Case, Explainer, Explanation, Shown, Verdict
from sae_runner.evaluators._showing import Showing
from sae_runner.evaluators.base import EvalContext, Setting
from sae_runner.models._text import ReadsTokens

log = logging.getLogger("sae_runner")
EXPLANATION_TOKENS, LIST_TOKENS, RATING_TOKENS = 120, 80, 6
"""What a reply may take: a sentence, a list of numbers, one rating."""
Flags = npt.NDArray[np.bool_]


@EXPLAINERS.register("lm")
class LanguageModel(Explainer):
    """Explanations and judgements of a language model.

    Args:
        base_url: of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        model: its name there.
        key_env: name of the environment variable that holds the key; None for none.
        local: folder of a causal transformer to ask instead.
        fuzz: whether marks are judged.
        simulate: whether each token is rated: one question for each scored excerpt.
        shuffled: whether excerpts are judged by other latents' explanations too.
        per_prompt: excerpts in a question.
        max_calls: questions of a run at most; further latents stay without a score.
        max_tokens: of questions and answers of a run, estimated.
        dollars_per_million: price of a million tokens, for the estimate; None if not known.
        concurrency: questions at a time.
        timeout: seconds for an answer.
        retries: further tries of a question.
        backoff: seconds before the second try, doubled before each further one.
    """

    modality = "text"

    def __init__(
        self,
        *,
        base_url: str | None,
        model: str | None,
        key_env: str | None,
        local: str | None,
        fuzz: bool,
        simulate: bool,
        shuffled: bool,
        per_prompt: Positive,
        max_calls: Positive,
        max_tokens: Positive,
        dollars_per_million: NonNegativeFloat | None,
        concurrency: Positive,
        timeout: PositiveFloat,
        retries: NonNegative,
        backoff: NonNegativeFloat,
    ) -> None:
        self.base_url, self.model, self.key_env, self.local = base_url, model, key_env, local
        self.fuzz, self.simulate, self.shuffled = fuzz, simulate, shuffled
        self.per_prompt, self.max_calls, self.max_tokens = per_prompt, max_calls, max_tokens
        self.dollars_per_million, self.concurrency = dollars_per_million, concurrency
        self.timeout, self.retries, self.backoff = timeout, retries, backoff

    # -- Before -------------------------------------------------------------------------------

    def check(self, setting: Setting) -> None:
        """See `Explainer.check`."""
        if not isinstance(setting.shapes(), ReadsTokens):
            raise ConfigError(
                "excerpts need a model of text; for images use evaluators=[autointerp_clip]"
            )
        if setting.selection.tokens == "mean":
            raise ConfigError("site.tokens=mean: no token of a text is marked; use site.tokens=all")
        if (self.base_url is None) == (self.local is None):
            raise ConfigError(
                "backend.base_url=URL or backend.local=FOLDER: give one of them, to say who is "
                "asked"
            )
        if self.local is not None:
            folder_of(self.local)
            return
        self._check_url(str(self.base_url))
        if not self.model:
            raise ConfigError("backend.model=null: needs the model's name at backend.base_url")
        # What a key variable is called is not repeated: it may be a key, by mistake.
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise ConfigError(
                "backend.key_env: no environment variable of that name is set (it takes the name "
                "of one, never the key)"
            )

    def _check_url(self, url: str) -> None:
        """Refuse what is no address, and one that carries a secret."""
        parts = urlsplit(url)
        if "@" in url or parts.query or parts.fragment:
            raise ConfigError(
                "backend.base_url: a URL with a user, password or query is not taken, for it is "
                "written to reports; put the key into an environment variable, backend.key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"backend.base_url={url}: needs http(s)://HOST/…, e.g. http://localhost:8000/v1"
            )

    def reads(self) -> dict[str, str]:
        """The wording's version, and which local model."""
        found = {"prompts": _prompts.VERSION}
        if self.local is not None:
            found["local"] = hashlib.sha256(identity_of(self.local).encode()).hexdigest()
        return found

    def start(self, context: EvalContext, showing: Showing) -> None:
        """Find the answers of earlier runs; a local model is loaded."""
        self.seed, self.incomplete = context.seed, ""
        path = None if context.folder is None else Path(context.folder) / "answers.jsonl"
        speaker: Speaker
        if self.local is not None:
            speaker, who = Local(self.local, showing.model.device), identity_of(self.local)
        else:
            key = os.environ.get(self.key_env) if self.key_env else None
            speaker = Endpoint(
                str(self.base_url), str(self.model), key, timeout=self.timeout,
                retries=self.retries, backoff=self.backoff,
            )  # fmt: skip
            who = f"{self.base_url} {self.model}"
        self.asking = Asking(
            speaker, f"{who} {_prompts.VERSION}", path, max_calls=self.max_calls,
            max_tokens=self.max_tokens, concurrency=1 if self.local else self.concurrency,
        )  # fmt: skip

    # -- Explaining -----------------------------------------------------------------------------

    def explain(self, cases: Sequence[Case]) -> list[Explanation | None]:
        """See `Explainer.explain`; no more latents are begun than the budget can finish."""
        prompts = [self._question(case) for case in cases]
        known = [self.asking.knows(prompt, EXPLANATION_TOKENS) for prompt in prompts]
        begun = self._begun(cases, known)
        self._announce(cases, prompts, sum(known))

        def ask(i: int) -> Explanation | None:
            if not begun[i]:
                return None
            try:
                text = self.asking.ask(prompts[i], EXPLANATION_TOKENS, _prompts.sentence_of)
            except (Unanswered, Unparsed):
                return None
            return Explanation(text, text)

        return self.asking.each("autointerp: explaining", ask, range(len(cases)))

    def _begun(self, cases: Sequence[Case], known: Sequence[bool]) -> list[bool]:
        """Which latents the budget can finish, where the first question of some is answered."""
        per_latent = max((self._calls(case) for case in cases), default=1)
        room = self.max_calls // per_latent
        begun = [k or sum(not x for x in known[:i]) < room for i, k in enumerate(known)]
        if not all(begun):
            self.asking.why = f"backend.max_calls={self.max_calls} is spent"
        return begun

    def recalled(self, text: str, rule: Any) -> Explanation:
        """See `Explainer.recalled`."""
        return Explanation(text, text)

    def take_over(
        self, explanations: Sequence[Explanation], cases: Sequence[Case]
    ) -> list[Explanation | None]:
        """See `Explainer.take_over`; no more latents are begun than the budget can finish."""
        known = []
        for explanation, case in zip(explanations, cases, strict=True):
            texts, _ = self._in_order(case)
            first = _prompts.detect(explanation.text, texts[: self.per_prompt])
            known.append(self.asking.knows(first, LIST_TOKENS))
        begun = self._begun(cases, known)
        self._announce(cases, [""] * len(cases), sum(known))
        return [e if begins else None for e, begins in zip(explanations, begun, strict=True)]

    def _in_order(self, case: Case) -> tuple[list[str], npt.NDArray[np.int64]]:
        """The scored excerpts as they are listed, and the place of each."""
        order = drawn(case, case.score, self.seed, ORDER)
        return [window_of(case.score[i]).text for i in order], order

    def _question(self, case: Case) -> str:
        return _prompts.explain(explained_excerpts(case))

    def _calls(self, case: Case) -> int:
        """Questions that a latent takes."""
        lists = -(-len(case.score) // self.per_prompt)
        n_active = sum(shown.act > 0 for shown in case.score)
        fuzz = -(-n_active // self.per_prompt) if self.fuzz else 0
        return 1 + lists * (1 + self.shuffled) + fuzz + len(case.score) * self.simulate

    def _announce(self, cases: Sequence[Case], prompts: Sequence[str], n_known: int) -> None:
        """Say what it may cost, before the first question."""
        n_calls = sum(map(self._calls, cases))
        size = 0
        for case, prompt in zip(cases, prompts, strict=True):
            text = sum(tokens(window_of(shown).text) for shown in case.score)
            lists = (1 + self.shuffled + self.fuzz) * text
            ratings = self.simulate * sum(
                2 * tokens(window_of(s).text) + RATING_TOKENS * len(window_of(s).pieces)
                for s in case.score
            )
            size += tokens(prompt) + EXPLANATION_TOKENS + lists + ratings
            size += LIST_TOKENS * (self._calls(case) - 1)
        price = "" if self.dollars_per_million is None else (
            f", about ${size / 1e6 * self.dollars_per_million:.2f}"
        )  # fmt: skip
        log.info(
            "autointerp: up to %s questions and %s tokens%s to %s for %d latents; limits: %s "
            "questions, %s tokens; %d of the latents were asked about before",
            f"{n_calls:,}", f"{size:,}", price, self.local or f"{self.model} at {self.base_url}",
            len(cases), f"{self.max_calls:,}", f"{self.max_tokens:,}", n_known,
        )  # fmt: skip

    # -- Judging --------------------------------------------------------------------------------

    def predict(
        self,
        explanations: Sequence[Explanation | None],
        cases: Sequence[Case],
        *,
        control: bool = False,
    ) -> list[Verdict | None]:
        """See `Explainer.predict`; of other latents' explanations, excerpts alone are judged."""
        if control and not self.shuffled:
            return [None] * len(cases)

        def judge(i: int) -> Verdict | None:
            explanation = explanations[i]
            if explanation is None:
                return None
            try:
                return self._verdict(explanation.text, cases[i], control)
            except Unanswered:
                return None

        what = "autointerp: judging" + (" with others' explanations" if control else "")
        verdicts = self.asking.each(what, judge, range(len(cases)))
        log.info("%s: %s questions asked by now", what, f"{self.asking.n_calls:,}")
        why = self.asking.why or "replies that cannot be understood"
        if not control:
            n_missing = sum(verdict is None for verdict in verdicts)
            if n_missing:
                self.incomplete = f"{n_missing} of {len(cases)} latents are without a score: {why}"
        elif any(e and not v for e, v in zip(explanations, verdicts, strict=True)):
            self.incomplete = self.incomplete or (
                f"not all shuffled explanations are judged: {why}"
            )
        return verdicts

    def counts(self) -> dict[str, float]:
        """Replies that were not understood."""
        return {"n_unparsed": self.asking.n_unparsed}

    def _verdict(self, explanation: str, case: Case, control: bool) -> Verdict | None:
        verdict, understood = Verdict(), list[bool]()
        texts, order = self._in_order(case)
        truth = np.array([shown.act > 0 for shown in case.score], dtype=bool)
        verdict.said = self._lists(
            texts, truth[order],
            lambda part: _prompts.detect(explanation, part), understood,
        )[np.argsort(order)]  # fmt: skip
        if self.fuzz and not control:
            shown, right = marked_excerpts(case, self.seed)
            if len(shown):
                said = self._lists(
                    shown, right, lambda part: _prompts.fuzz(explanation, part), understood
                )
                verdict.fuzzed = (right, said)
        if self.simulate and not control:
            verdict.predicted = [self._rated(explanation, s, understood) for s in case.score]
        return verdict if any(understood) else None

    def _lists(
        self,
        texts: Sequence[str],
        truth: Flags,
        question: Callable[[Sequence[str]], str],
        understood: list[bool],
    ) -> Flags:
        """Yes or no of every text, some at a time; the opposite of true if not understood."""
        said: list[Flags] = []
        for start in range(0, len(texts), self.per_prompt):
            part = texts[start : start + self.per_prompt]
            answer = np.zeros(len(part), dtype=bool)
            try:
                parse = partial(_prompts.numbers_of, n=len(part))
                numbers = self.asking.ask(question(part), LIST_TOKENS, parse)
                answer[np.array(numbers, dtype=np.int64) - 1] = True
                understood.append(True)
            except Unparsed:
                answer = ~truth[start : start + self.per_prompt]
                understood.append(False)
            said.append(answer)
        return np.concatenate(said)

    def _rated(
        self, explanation: str, shown: Shown, understood: list[bool]
    ) -> npt.NDArray[np.float64]:
        """A rating of each token that the SAE reads; 0 where the reply is not understood."""
        window = window_of(shown)
        n = len(window.pieces)
        try:
            ratings = self.asking.ask(
                _prompts.simulate(explanation, window.pieces), RATING_TOKENS * n + 20,
                partial(_prompts.ratings_of, n=n),
            )  # fmt: skip
            understood.append(True)
        except Unparsed:
            ratings = [0.0] * n
            understood.append(False)
        rated: npt.NDArray[np.float64] = np.array(ratings)[window.read.numpy()]
        return rated
