"""Bodies of requests, in the fields of the OpenAI API and, for quality, those of DESIGN's contract.

Pure pydantic: what a single field may be. What depends on the model (its full budget, its context) is checked in
``admission``. Fields of the OpenAI API that would change the text and are not implemented are accepted at their
neutral value only, so that nothing is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_CHOICES = 64  # n times prompts of one request
MAX_LOGPROBS = 20

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Quality(_Body):
    """``vllm_xargs``: what the request asks of quality and speed."""

    # Their range depends on the model: see admission.
    k_min: int | None = Field(
        default=None, description="Quality floor: sub-experts a token runs at least.", json_schema_extra={"minimum": 1}
    )
    k_active: int | None = Field(
        default=None, description="The most that is wanted; alone, also the floor.", json_schema_extra={"minimum": 1}
    )
    ttft_ms: float | None = Field(default=None, gt=0, le=1e7, description="Wanted time to first token, milliseconds.")
    tpot_ms: float | None = Field(default=None, gt=0, le=1e7, description="Wanted time per later token, milliseconds.")


class StreamOptions(_Body):
    """``stream_options``."""

    include_usage: bool | None = Field(default=None, description="A last chunk without choices carries the usage.")
    continuous_usage_stats: bool | None = Field(default=None, description="Every chunk carries the usage so far.")
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Body):
    """``response_format``; plain text only."""

    type: Literal["text"]


class _Generation(_Body):
    """What completions and chat have in common."""

    model: str = Field(min_length=1, max_length=1000)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the most likely token; default 1.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = Field(default=None, description="Up to 16 texts that end the output.")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1, description="Lower runs earlier.")
    vllm_xargs: Quality = Field(default_factory=Quality)
    ignore_eos: bool = Field(default=False, description="Go on to max_tokens; for load generators.")
    user: str | None = None
    # Neutral values only: see the module.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    logit_bias: dict[str, Literal[0]] | None = None
    top_k: Literal[0, -1] | None = None
    min_p: Literal[0] | None = None

    @field_validator("frequency_penalty", "presence_penalty", "repetition_penalty", "min_p", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 16 or any(not 0 < len(text) <= 200 for text in texts):
            raise ValueError("stop takes up to 16 texts of 1 to 200 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the output."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_of_chunks(self) -> tuple[bool, bool]:
        """Whether a last chunk carries the usage, and whether every one does."""
        options = self.stream_options or StreamOptions()
        return bool(options.include_usage), bool(options.continuous_usage_stats)


class CompletionRequest(_Generation):
    """Body of /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Tokens
        | Annotated[list[Annotated[str, Field(min_length=1)] | Tokens], Field(min_length=1, max_length=MAX_CHOICES)]
    ) = Field(description="A text, its tokens, or several of either.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="Most likely tokens to report.")
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its content in one piece."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The same as max_tokens, which is older.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None


def allowed(field: str) -> str:
    """What a field may be, for error messages: its range, values or form; "" where there is no more to say.

    Args:
        field: its name alone, e.g. "temperature".
    """
    if field in _FORMS:
        return _FORMS[field]
    for body in (CompletionRequest, ChatRequest, Quality, StreamOptions, Message):
        found = body.model_json_schema()["properties"].get(field)
        for kind in () if found is None else (found, *found.get("anyOf", ())):
            if "enum" in kind:
                return "one of " + ", ".join(map(str, kind["enum"]))
            if "const" in kind:
                return f"{kind['const']!r} only, since nothing else is implemented"
            low = kind.get("minimum", kind.get("exclusiveMinimum"))
            high = kind.get("maximum", kind.get("exclusiveMaximum"))
            if low is not None:
                above = "above" if "exclusiveMinimum" in kind else "from"
                return f"{above} {low} to {high}" if high is not None else f"{low} or more"
    return ""


_FORMS = {
    "prompt": "a text, a list of token ids, or a list of either; none of them empty",
    "messages": "a list of objects with a role and a content, at least one",
    "content": 'a text, or a list of {"type": "text", "text": ...}',
    "stop": "a text or a list of up to 16, each of 1 to 200 characters",
}
