"""Words that options of PEFT may be, where several types have them."""

from __future__ import annotations

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""What `task_type` may be, and the class of the base model that PEFT loads for it."""
STARTS = ("gaussian", "pissa", "olora", "orthogonal", "eva", "lora_ga", "mica", "corda", "loftq", "pissa_niter_16")
"""What `init_lora_weights` may be; of the last one, with any number."""
