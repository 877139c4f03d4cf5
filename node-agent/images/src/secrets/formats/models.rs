//! Keys of those who serve models.

use super::{Format, is_token, token};

pub(super) const ALL: &[Format] = &[
    token(
        "anthropic-key",
        "A key or token of Anthropic.",
        &["sk-ant-"],
        r"sk-ant-[a-z]{3,8}[0-9]{2}-[A-Za-z0-9_-]{32,}",
    ),
    token(
        "openai-key",
        "A key of OpenAI, or of a service with keys of the same form.",
        &["sk-"],
        r"sk-(?:(?:proj|svcacct|admin|None|service)-[A-Za-z0-9_-]{32,}|[A-Za-z0-9]{32,64}\b)",
    )
    .check(|hit| is_token(hit) && hit.value[3..].iter().filter(|b| b.is_ascii_digit()).count() > 1),
    token("openrouter-key", "A key of OpenRouter.", &["sk-or-v1-"], r"sk-or-v1-[0-9a-f]{64}\b"),
    token(
        "huggingface-token",
        "A token of Hugging Face.",
        &["hf_", "api_org_"],
        r"(?:hf|api_org)_[A-Za-z0-9]{34,40}\b",
    ),
    token("groq-key", "A key of Groq.", &["gsk_"], r"gsk_[A-Za-z0-9]{52}\b"),
    token("xai-key", "A key of xAI.", &["xai-"], r"xai-[A-Za-z0-9]{80}\b"),
    token("nvidia-key", "A key of NVIDIA.", &["nvapi-"], r"nvapi-[A-Za-z0-9_-]{60,70}"),
    token("perplexity-key", "A key of Perplexity.", &["pplx-"], r"pplx-[A-Za-z0-9]{48}\b"),
    token("replicate-token", "A token of Replicate.", &["r8_"], r"r8_[A-Za-z0-9]{37}\b"),
    token(
        "langsmith-key",
        "A key of LangSmith.",
        &["lsv2_"],
        r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}\b",
    ),
];
