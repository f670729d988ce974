"""Styles of models: what transformers returns, caches, hooks inside, and architectures from ViT to LSTM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from seeded import seeded
from styles import CLASSES, Style, style
from tiny import tiny_causal_lm
from torch import Tensor, nn
from torch.utils.data import DataLoader


@style
class DefaultForward(Style):
    """As in transformers' documentation: labels in, loss out, and a cache that nobody asked for."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"])
        cache = out.past_key_values
        self.log("loss", out.loss)
        self.log("cached_layers", float(len(cache.layers)))
        self.log("cached_length", float(cache.get_seq_length()))
        for i, layer in enumerate(cache.layers):
            self.log(f"keys_{i}", layer.keys.sum())
            self.log(f"values_{i}", layer.values.sum())
        return out.loss


@style
class ContinuesFromCache(Style):
    """Prefill, then one token at a time, then the same cache for another call."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        out = self.model(ids[:, :4])
        loss = torch.zeros(())
        for i in range(4, ids.shape[1]):
            loss = loss + F.cross_entropy(out.logits[:, -1], ids[:, i])
            out = self.model(ids[:, i : i + 1], past_key_values=out.past_key_values)
        self.log("loss", loss)
        self.log("length", float(out.past_key_values.get_seq_length()))
        self.log("keys", out.past_key_values.layers[0].keys.sum() + out.past_key_values.layers[3].keys.sum())


@style
class Generates(Style):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        greedy = self.model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=2)
        sampled = self.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, pad_token_id=2)
        beams = self.model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=2, pad_token_id=2)
        self.log("greedy", greedy[:, 7:].float().mean())
        self.log("sampled", sampled[:, 7:].float().mean())
        self.log("beams", beams[:, 7:].float().mean())
        return {"greedy": (greedy[:, -1] % 2 == 0)}


@style
class MixtralRouterLoss(Style):
    plan = "2.fc_out[1]@0.1, 2.q_proj@0.1"

    def build(self) -> nn.Module:
        config = hf.MixtralConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            router_aux_loss_coef=0.5,
            sliding_window=None,
        )
        return seeded(lambda: hf.MixtralForCausalLM(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = batch["input_ids"]
        out = self.model(ids, labels=ids, output_router_logits=True)
        self.log("loss", out.loss)
        self.log("aux", out.aux_loss)
        self.log("routers", float(len(out.router_logits)))
        self.log("without", self.model(ids, labels=ids).loss)


@style
class Attentions(Style):
    """Eager attention with all outputs."""

    def build(self) -> nn.Module:
        model = tiny_causal_lm()
        model.set_attn_implementation("eager")
        return model

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.model(batch["input_ids"], output_attentions=True, output_hidden_states=True)
        self.log("loss", F.cross_entropy(out.logits[:, -1, :CLASSES], batch["labels"]))
        self.log("n", float(len(out.attentions) * 100 + len(out.hidden_states)))
        for i, attention in enumerate(out.attentions):
            self.log(f"attention_{i}", attention.max(dim=-1).values.mean())
        hidden = self.model(batch["input_ids"], output_hidden_states=True).hidden_states
        for i, states in enumerate(hidden):
            self.log(f"hidden_{i}", states.norm())


@style
class InnerHook(Style):
    """A forward hook inside of a layer, as in interpretability work."""

    def __init__(self) -> None:
        super().__init__()
        self.fired = 0
        self.captured: list[Tensor] = []
        self.model.model.layers[0].mlp.register_forward_hook(self.capture)
        self.model.model.layers[1].register_forward_hook(self.capture)

    def capture(self, module: nn.Module, args: Any, output: Any) -> None:
        self.fired += 1
        self.captured.append(output.norm())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.logits(batch), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        self.log("fired", float(self.fired))
        self.log("captured", torch.stack(self.captured).mean())


@style
class HookForOneEvaluation(Style):
    """Registered when the evaluation starts, removed when it ends."""

    def on_validation_epoch_start(self) -> None:
        self.captured: list[Tensor] = []
        layers = self.model.model.layers
        capture = lambda module, args, output: self.captured.append(output.norm())  # noqa: E731
        self.handles = [layer.mlp.register_forward_hook(capture) for layer in (layers[0], layers[3])]
        self.handles.append(
            layers[1].register_forward_pre_hook(lambda module, args: self.captured.append(args[0].max()))
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.logits(batch), batch["labels"]))
        self.log("captured", float(len(self.captured)))

    def on_validation_epoch_end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.log("mean", torch.stack(self.captured).mean())
        self.log("left", float(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules())))


@style
class ViT(Style):
    plan = "1.mlp@0.1"

    def build(self) -> nn.Module:
        config = hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        )
        return seeded(lambda: hf.ViTForImageClassification(config)).eval()

    def data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        items = [(torch.randn(3, 16, 16, generator=generator), i % CLASSES) for i in range(10)]
        return DataLoader(items, batch_size=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        out = self.model(images, labels=labels)
        self.log("loss", out.loss)
        self.log("right", (out.logits.argmax(1) == labels).sum().float(), reduce_fx="sum")


@style
class Bert(Style):
    plan = "2.mlp@0.1, 1.v_proj@0.1"

    def build(self) -> nn.Module:
        config = hf.BertConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
        )
        config.num_labels = CLASSES
        return seeded(lambda: hf.BertForSequenceClassification(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        mask = torch.ones_like(batch["input_ids"])
        mask[::2, -2:] = 0
        out = self.model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"])
        self.log_dict({"loss": out.loss, "acc": (out.logits.argmax(-1) == batch["labels"]).float().mean()})


@style
class T5(Style):
    """A cut in the encoder: whatever the decoder does depends on it."""

    plan = "encoder.1.mlp@0.1"

    def build(self) -> nn.Module:
        config = hf.T5Config(
            vocab_size=300,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        return seeded(lambda: hf.T5ForConditionalGeneration(config)).eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"].flip(1))
        self.log("loss", out.loss)
        without = self.model(input_ids=batch["input_ids"], labels=batch["input_ids"].flip(1), use_cache=False)
        self.log("without_cache", without.loss)


@style
class T5CutInDecoder(T5):
    plan = "decoder.1.mlp@0.1"


@style
class Albert(Bert):
    """All layers are one layer."""

    plan = "0.mlp@0.2"

    def build(self) -> nn.Module:
        config = hf.AlbertConfig(
            vocab_size=300,
            hidden_size=32,
            embedding_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=CLASSES,
        )
        return seeded(lambda: hf.AlbertForSequenceClassification(config)).eval()


@style
class LSTM(Style):
    plan = r"/rnn\..*weight_hh_l1/@0.2"

    def build(self) -> nn.Module:
        return seeded(lambda: nn.ModuleDict({"embed": nn.Embedding(300, 16), "out": nn.Linear(24, CLASSES)}))

    def __init__(self) -> None:
        super().__init__()
        self.rnn = seeded(lambda: nn.LSTM(16, 24, num_layers=2, batch_first=True), seed=1)
        self.carry: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        states = self.carry if self.carry is not None and self.carry[0].shape[1] == len(batch["labels"]) else None
        hidden, self.carry = self.rnn(self.model["embed"](batch["input_ids"]), states)
        logits = self.model["out"](hidden[:, -1])
        self.log("loss", F.cross_entropy(logits, batch["labels"]))


class NaiveBlock(nn.Module):
    """As in many a tutorial: the residual is added in place, to the caller's tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.fc_in, self.fc_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x += self.out_proj(F.scaled_dot_product_attention(self.q_proj(h), h, h, is_causal=True))
        x += self.fc_out(F.gelu(self.fc_in(self.norm2(x))))
        return x


@style
class InPlaceResidual(Style):
    """The same tensor goes through all layers; snapshots between them, an addition in place between two of them."""

    plan = "2.fc_in@0.1"

    def build(self) -> nn.Module:
        def make() -> nn.Module:
            layers = nn.ModuleList(NaiveBlock(16) for _ in range(4))
            return nn.ModuleDict({"embed": nn.Embedding(300, 16), "layers": layers, "out": nn.Linear(16, CLASSES)})

        return seeded(make)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        embedded = x = self.model["embed"](batch["input_ids"])
        kept = []
        for i, layer in enumerate(self.model["layers"]):
            kept.append(x)
            x = layer(x)
            if i == 0:
                x += 1
        logits = self.model["out"](x[:, -1])
        self.log("loss", F.cross_entropy(logits, batch["labels"]))
        self.log("embedded", embedded.sum())
        for i, states in enumerate(kept):
            self.log(f"kept_{i}", states.sum())


@style
class TestTimeGradient(Style):
    """Grad mode is switched on within the step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            embedded = self.model.get_input_embeddings()(batch["input_ids"].clone()).detach().requires_grad_()
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[:, -1, :CLASSES]
            loss = F.cross_entropy(logits, batch["labels"].clone())
            (gradient,) = torch.autograd.grad(loss, embedded)
        self.log("loss", loss.detach())
        self.log("saliency", gradient.norm())
