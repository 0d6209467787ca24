"""OpenDelta's soft prompt: learned rows in front of the word embeddings."""

from __future__ import annotations

from deltaspec.formats.incoming import IncomingSite
from deltaspec.formats.opendelta.saved import Saved
from deltaspec.formats.options import Options

INFIXES = ("soft_prompt_layer",)
NEEDS = "its soft_token_num"


def read(saved: Saved, options: Options, part: str) -> None:
    """Add the delta."""
    options.ignore("init_range", "token_init", "modified_modules", "exclude_modules", "common_structure")
    usual = {"attention_mask": 1, "token_type_ids": 0}
    options.refuse(
        "other_expand_ids", "ids of prompts are the usual ones here", "train with those", unless=(None, usual)
    )
    tokens = options.whole("soft_token_num", 100, least=1)
    modules = list(saved.modules("soft_prompt_layer"))
    entrance = next((row for row in saved.base.table.rows if row.entrance and row.entrance.problem is None), None)
    if entrance is None:
        message = f"puts tokens in front of the ids, and {saved.base.table.model_class} takes none"
        saved.find("DS523", message, "load its base model", saved.file)
        return
    for module in modules:
        key = f"{module}.soft_prompt_layer.soft_embeds".lstrip(".")
        prompt = saved.take(key, "rows in front of the word embeddings", (tokens, None))
        if prompt is not None:
            site = IncomingSite(entrance.fqn, {"prompt": prompt})
            saved.add("soft_prompt", {"tokens": tokens}, [site], part, default_target=True)
    saved.remark("OpenDelta gives logits of the prompt's own positions, too: here they are left out")
    saved.remark("where no attention_mask is given, OpenDelta takes tokens of id 0 for padding, and nothing is here")
