"""A tool, its schema, and calling it so that nothing it does can stop a run."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short

SECONDS = 20.0


@dataclass(frozen=True)
class Tool:
    """One tool: its name in traces, what it is for, its arguments (name -> meaning), and the function of the argument text."""

    name: str
    line: str
    arguments: dict[str, str]
    call: Callable[[str], str]

    def schema(self) -> dict[str, Any]:
        """The tool as OpenAI's chat API describes it."""
        properties = {n: {"type": "string", "description": d} for n, d in self.arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.arguments), "additionalProperties": False}
        name = self.name.replace(".", "_")  # the API allows letters, digits, _ and -
        return {"type": "function", "function": {"name": name, "description": self.line, "parameters": parameters}}

    def text(self) -> str:
        """The tool as the paper's prompts describe it."""
        return f"{self.name}({', '.join(self.arguments)}): {self.line}"


class ToolBox:
    """Tools by name. A call never raises: what goes wrong becomes the observation."""

    def __init__(self, tools: list[Tool], seconds: float = SECONDS):
        self.tools = {t.name: t for t in tools}
        self.seconds = seconds
        self.failures: dict[str, int] = {}

    def __getitem__(self, name: str) -> Tool:
        if name not in self.tools:
            raise UserError(f"there is no tool '{name}'", how=did_you_mean(name, self.tools))
        return self.tools[name]

    def schemas(self) -> list[dict[str, Any]]:
        """All tools as OpenAI's chat API takes them."""
        return [t.schema() for t in self.tools.values()]

    def observe(self, name: str, text: str) -> str:
        """What a tool says to an argument text in the paper's form."""
        if name not in self.tools:
            return self._failed(name, f"There is no tool {name}.")
        box: list[str] = []

        def work() -> None:
            try:
                box.append(str(self.tools[name].call(text)))
            except Exception as error:  # a tool may raise anything
                box.append(self._failed(name, f"The tool {name} failed: {short(error)}."))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.seconds)
        return box[0] if box else self._failed(name, f"The tool {name} gave no answer within {self.seconds:g} seconds.")

    def observe_json(self, name: str, arguments: str | dict[str, Any]) -> str:
        """The same from a call as OpenAI's API writes it: the name with _ for a dot, the arguments as JSON."""
        known = {n.replace(".", "_"): n for n in self.tools}
        try:
            values = json.loads(arguments) if isinstance(arguments, str) else arguments
            tool = self.tools[known[name]]
            text = ", ".join(str(values[a]) for a in tool.arguments)
        except (ValueError, KeyError, TypeError) as error:
            return self._failed(name, f"The call of {name} cannot be read: {short(error)}.")
        return self.observe(tool.name, text)

    def _failed(self, name: str, sentence: str) -> str:
        self.failures[name] = self.failures.get(name, 0) + 1
        return sentence
