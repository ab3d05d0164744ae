"""A server that writes by a model in this process: completions by token ids, adapters at run time, and a reload."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fake_server import Answer, FakeServer
from kd_lightning.data.tokenization import load_tokenizer
from kd_lightning.models.generate import Sampling, generate
from kd_lightning.models.hf_adapter import eos_token_ids
from kd_lightning.models.loading import load_causal_lm

FP32 = {"dtype": "float32"}


class WritingServer(FakeServer):
    """Answers as vLLM does, by a bundled model.

    Args:
        base: the model it was started with.
        fault: called with number, path and body of a request; what it gives is answered; None: this server's answer.
        ids: give token ids of responses.
        adapters: has the endpoints for adapters.
        ignore: what it claims to load is not loaded: "adapters" (the base answers by their names), "reload".
        change: of the tokens of each response before they are decoded and sent.
        max_model_len: as in the list of models.
        delay: seconds that an answer takes.

    Attributes:
        loaded: folders by the name of the adapter.
        unloaded: names of adapters, in order.
        reloaded: folders, in order.
    """

    def __init__(
        self,
        base: str = "asset:student",
        fault: Any = None,
        ids: bool = True,
        adapters: bool = True,
        ignore: str = "",
        change: Callable[[list[int]], list[int]] | None = None,
        max_model_len: int | None = None,
        delay: float = 0.0,
        port: int = 0,
    ) -> None:
        self.base, self.fault, self.ids, self.adapters, self.ignore = base, fault, ids, adapters, ignore
        self.change = change
        self.max_model_len = max_model_len
        self.tokenizer = load_tokenizer(base)
        self.models: dict[str, Any] = {"base": load_causal_lm(base, kwargs=FP32, role="student").eval()}
        self.loaded: dict[str, str] = {}
        self.unloaded: list[str] = []
        self.reloaded: list[str] = []
        self._compute = threading.Lock()
        super().__init__(self._choose, delay=delay, port=port)

    def reload_command(self) -> list[str]:
        """A command that makes this server load a folder, as a user would write it."""
        code = "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode()))"
        return [sys.executable, "-c", code, f"{self.url}/reload", '{"folder": "{folder}", "step": {step}}']

    def generated(self) -> list[dict[str, Any]]:
        """The requests for responses, without those of the tests of the weights."""
        return [body for body in self.bodies if body.get("return_token_ids")]

    def _choose(self, number: int, path: str, body: Any) -> Answer | None:
        if self.fault is not None and (found := self.fault(number, path, body)) is not None:
            answer: Answer = found
            return answer
        if path == "/v1/models":
            length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
            cards = [{"id": name, **({} if name == "base" else {"parent": "base"}), **length} for name in self.models]
            return 200, json.dumps({"data": cards}).encode()
        if path == "/reload":
            self.reloaded.append(body["folder"])
            if self.ignore != "reload":
                self.models["base"] = load_causal_lm(body["folder"], kwargs=FP32, role="student").eval()
            return 200, b"{}"
        if path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.adapters:
            return self._load(body) if path == "/v1/load_lora_adapter" else self._unload(body["lora_name"])
        if path != "/v1/completions":
            return 404, b'{"detail": "Not Found"}'
        if body["model"] not in self.models:
            return 404, f"The model `{body['model']}` does not exist.".encode()
        with self._compute:
            return self._complete(self.models[body["model"]], body)

    def _load(self, body: dict[str, str]) -> Answer:
        from peft import PeftModel

        name, folder = body["lora_name"], body["lora_path"]
        if name in self.models:
            return 400, f"The lora adapter '{name}' has already been loaded.".encode()
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            return 404, f"Loading lora {name} failed: No adapter found for {folder}".encode()
        model: Any = load_causal_lm(self.base, kwargs=FP32, role="student")
        if self.ignore != "adapters":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT calls what transformers has deprecated
                model = PeftModel.from_pretrained(model, folder)
        self.models[name] = model.eval()
        self.loaded[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _unload(self, name: str) -> Answer:
        if self.models.pop(name, None) is None:
            return 404, f"The lora adapter '{name}' cannot be found.".encode()
        self.unloaded.append(name)
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def _complete(self, model: Any, body: dict[str, Any]) -> Answer:
        ids = body["prompt"]
        if body.get("prompt_logprobs") is not None:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            entries = [{str(ids[t]): {"logprob": float(scores[t - 1, ids[t]])}} for t in range(1, len(ids))]
            choice = {"text": "", "finish_reason": "length", "prompt_logprobs": [None, *entries]}
            return 200, json.dumps({"choices": [choice]}).encode()
        prompt = torch.tensor([ids])
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"])
        found = generate(model, prompt, torch.ones_like(prompt), sampling, seed=body["seed"])[0].tolist()
        ends = [n for n, token in enumerate(found) if token in eos_token_ids(model)]
        found = found[: ends[0] + 1] if ends else found
        found = self.change(found) if self.change is not None else found
        content = found[:-1] if ends else found
        text = self.tokenizer.decode(content, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        choice = {"text": text, "finish_reason": "stop" if ends else "length"}
        if self.ids and body.get("return_token_ids"):
            choice |= {"token_ids": found, "prompt_token_ids": ids}
        return 200, json.dumps({"choices": [choice]}).encode()
