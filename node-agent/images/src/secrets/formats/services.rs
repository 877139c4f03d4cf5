//! Tokens of services that applications talk to: chat, mail, payment, monitoring, planning.

use super::{Format, is_token, token};
use crate::secrets::engine::Hit;
use crate::secrets::value;

pub(super) const ALL: &[Format] = &[
    token(
        "slack-token",
        "A token of Slack.",
        &["xoxa-", "xoxb-", "xoxc-", "xoxd-", "xoxe", "xoxo-", "xoxp-", "xoxr-", "xoxs-", "xapp-"],
        r"(?:xox[abcdeoprs](?:\.xox[bp])?-[A-Za-z0-9%-]{20,}|xapp-[0-9]-[A-Z0-9]{8,}-[0-9]{8,}-[0-9a-f]{32,})",
    )
    .check(|hit| is_token(hit) && hit.text.iter().any(u8::is_ascii_digit)),
    token(
        "slack-webhook",
        "A webhook of Slack.",
        &["hooks.slack.com/"],
        r"hooks\.slack\.com/(?:services|workflows|triggers)/([A-Za-z0-9/_-]{30,})",
    ),
    token(
        "discord-webhook",
        "A webhook of Discord.",
        &["/api/webhooks/"],
        r"/api/webhooks/[0-9]{17,20}/([A-Za-z0-9_-]{60,})",
    )
    .anywhere(),
    token(
        "discord-token",
        "The token of a Discord bot.",
        &["discord", "Bot "],
        r#"(?:(?i:discord)[\w .-]{0,30}["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?|Bot )([MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,40})"#,
    )
    .anywhere(),
    token(
        "teams-webhook",
        "A webhook of Microsoft Teams.",
        &[".webhook.office.com/"],
        r"\.webhook\.office\.com/webhookb2/[0-9a-f-]{36}@[0-9a-f-]{36}/IncomingWebhook/([0-9a-f]{32})",
    )
    .anywhere(),
    token(
        "telegram-token",
        "The token of a Telegram bot.",
        &[":AA"],
        r"[0-9]{8}:AA[A-Za-z0-9_-]{33}(?:[^A-Za-z0-9_-]|\z)",
    )
    .back(8)
    .anywhere(),
    token(
        "twilio-key",
        "An API key of Twilio.",
        &["SK"],
        r"SK[0-9a-f]{32}\b",
    ),
    token(
        "sendgrid-key",
        "A key of SendGrid.",
        &["SG."],
        r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?:[^A-Za-z0-9_-]|\z)",
    ),
    token(
        "mailgun-key",
        "A key of Mailgun.",
        &["key-"],
        r"key-[0-9a-f]{32}\b",
    ),
    token(
        "mailchimp-key",
        "A key of Mailchimp.",
        &["-us"],
        r"[0-9a-f]{32}-us[0-9]{1,2}\b",
    )
    .back(32),
    token(
        "brevo-key",
        "A key of Brevo.",
        &["xkeysib-", "xsmtpsib-"],
        r"x(?:keysib|smtpsib)-[0-9a-f]{64}-[A-Za-z0-9]{16}\b",
    ),
    token(
        "resend-key",
        "A key of Resend.",
        &["re_"],
        r"re_[A-Za-z0-9]{8}_[A-Za-z0-9]{24}\b",
    )
    .check(|hit| is_token(hit) && hit.text.iter().any(u8::is_ascii_digit)),
    token(
        "stripe-key",
        "A live key or webhook secret of Stripe.",
        &["sk_live_", "rk_live_", "whsec_"],
        r"(?:[sr]k_live_[A-Za-z0-9]{20,247}\b|whsec_[A-Za-z0-9+/]{32,}={0,2})",
    ),
    token(
        "square-token",
        "A token of Square.",
        &["EAAA", "sq0atp-", "sq0csp-"],
        r"(?:EAAA[A-Za-z0-9_-]{60}(?:[^A-Za-z0-9_-]|\z)|sq0(?:atp|csp)-[A-Za-z0-9_-]{22,43})",
    )
    .check(|hit| is_no_base64(hit) && hit.text[4..].iter().any(u8::is_ascii_digit)),
    token(
        "shopify-token",
        "A token of Shopify.",
        &["shpat_", "shpca_", "shppa_", "shpss_"],
        r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}\b",
    ),
    token(
        "facebook-token",
        "An access token of Facebook.",
        &["EAACEdEose0cBA", "EAAG", "EAAB"],
        r"(?:EAACEdEose0cBA[A-Za-z0-9]{20,}|EAA[BG][A-Za-z0-9]{100,250}\b)",
    )
    .check(is_no_base64),
    token(
        "dropbox-token",
        "An access token of Dropbox.",
        &["sl."],
        r"sl\.(?:u\.)?[A-Za-z0-9_-]{130,}",
    ),
    token(
        "datadog-key",
        "A key of Datadog.",
        &["datadog", "dd_api_key", "dd_app_key", "dd-api-key", "dd-application-key"],
        r#"(?i:datadog[\w .-]{0,20}|dd[_-](?:api|app|application)[_-]key)["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?([0-9a-f]{40}|[0-9a-f]{32})\b"#,
    )
    .anywhere(),
    token(
        "new-relic-key",
        "A key of New Relic.",
        &["NRAK-"],
        r"NRAK-[A-Z0-9]{27}\b",
    ),
    token(
        "new-relic-license-key",
        "A license key of New Relic.",
        &["NRAL"],
        r"[0-9a-f]{36}NRAL\b",
    )
    .back(36)
    .anywhere(),
    token(
        "sentry-token",
        "A token of Sentry.",
        &["sntrys_", "sntryu_"],
        r"(?:sntryu_[0-9a-f]{64}\b|sntrys_eyJ[A-Za-z0-9+/_=-]{80,})",
    ),
    token(
        "grafana-token",
        "A token of Grafana.",
        &["glsa_", "glc_eyJ", "eyJrIjoi"],
        r"(?:glsa_[A-Za-z0-9]{32}_[0-9a-fA-F]{8}\b|glc_eyJ[A-Za-z0-9+/]{32,}={0,3}|eyJrIjoi[A-Za-z0-9+/]{60,}={0,3})",
    ),
    token(
        "dynatrace-token",
        "A token of Dynatrace.",
        &["dt0c01.", "dt0s16."],
        r"dt0[cs](?:01|16)\.[A-Z0-9]{24}\.[A-Z0-9]{64}\b",
    ),
    token(
        "linear-key",
        "A key of Linear.",
        &["lin_api_", "lin_oauth_"],
        r"lin_(?:api|oauth)_[A-Za-z0-9]{40,64}\b",
    ),
    token(
        "notion-token",
        "A token of Notion.",
        &["ntn_", "secret_"],
        r"(?:ntn_[0-9]{11}[A-Za-z0-9]{35}|secret_[A-Za-z0-9]{43})\b",
    ),
    token(
        "figma-token",
        "A token of Figma.",
        &["figd_"],
        r"figd_[A-Za-z0-9_-]{40,}",
    ),
    token(
        "airtable-token",
        "A personal access token of Airtable.",
        &["airtable"],
        r#"(?i:airtable)[\w .-]{0,30}["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?(pat[A-Za-z0-9]{14}\.[0-9a-f]{64})\b"#,
    )
    .anywhere(),
];

/// Tokens of letters and digits that begin as small numbers in base64 do, and there are many of those.
fn is_no_base64(hit: &Hit<'_>) -> bool {
    let joins = |byte: Option<&u8>| byte.is_some_and(|b| b"+/".contains(b));
    is_token(hit)
        && !joins(hit.before.last())
        && !joins(hit.after.first())
        && value::entropy(hit.text) >= 4.5
}
