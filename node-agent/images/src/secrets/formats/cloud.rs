//! Keys of clouds and of those who run servers, databases and networks for others.

use super::{Format, is_token, token};
use crate::secrets::engine::Hit;
use crate::secrets::value;

pub(super) const ALL: &[Format] = &[
    token(
        "aws-access-key",
        "The id of an AWS access key.",
        &["AKIA", "ASIA", "ABIA", "ACCA"],
        r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b",
    ),
    token(
        "aws-secret-key",
        "The secret of an AWS access key, by the name before it.",
        &["secret_access_key", "secretaccesskey", "aws_secret_key", "secret access key"],
        r#"(?i:(?:secret[_ ]?access[_ ]?|aws_secret_)key)["'`]{0,2}\s{0,4}(?:=>|:=|=|:|>|,)\s{0,4}["'`]?([A-Za-z0-9/+]{40})(?:[^A-Za-z0-9/+=]|\z)"#,
    )
    .anywhere(),
    token(
        "aws-session-token",
        "The token of a temporary AWS login.",
        &["session_token", "sessiontoken"],
        r#"(?i:session_?token)["'`]{0,2}\s{0,4}(?:=>|:=|=|:|>)\s{0,4}["'`]?([A-Za-z0-9/+]{100,}={0,2})"#,
    )
    .anywhere(),
    token(
        "gcp-api-key",
        "An API key of Google Cloud, Maps or Firebase.",
        &["AIza"],
        r"AIza[A-Za-z0-9_-]{35}(?:[^A-Za-z0-9_-]|\z)",
    ),
    token(
        "gcp-service-account",
        "The key file of a Google Cloud service account.",
        &[r#""private_key_id""#],
        r#""private_key_id"\s*:\s*"([0-9a-f]{40})""#,
    )
    .anywhere(),
    token(
        "gcp-oauth-secret",
        "The secret of a Google OAuth client.",
        &["GOCSPX-"],
        r"GOCSPX-[A-Za-z0-9_-]{28}(?:[^A-Za-z0-9_-]|\z)",
    ),
    token(
        "gcp-oauth-token",
        "An access or refresh token of a Google login.",
        &["ya29.", "1//0"],
        r"(?:ya29\.[A-Za-z0-9_-]{50,}|1//0[A-Za-z0-9_-]{60,})",
    ),
    token(
        "azure-storage-key",
        "An account key in a connection string of Azure.",
        &["AccountKey=", "SharedAccessKey="],
        r"(?i:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{43}=|[A-Za-z0-9+/]{86}==)",
    )
    .anywhere(),
    token(
        "azure-client-secret",
        "The client secret of an Azure application.",
        &["Q~"],
        r"[A-Za-z0-9_~.-]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34}(?:[^A-Za-z0-9_~.-]|\z)",
    )
    .back(4),
    token(
        "azure-sas",
        "A signed URL of Azure.",
        &["sig="],
        r"sig=([A-Za-z0-9+/%]{43,60}(?:=|%3[dD]))",
    )
    .anywhere()
    .check(is_of_a_signed_url),
    token(
        "azure-devops-token",
        "A personal access token of Azure DevOps.",
        &["AZDO"],
        r"[A-Za-z0-9]{76}AZDO[A-Za-z0-9]{4}\b",
    )
    .back(76),
    token(
        "digitalocean-token",
        "A token of DigitalOcean.",
        &["dop_v1_", "doo_v1_", "dor_v1_"],
        r"do[opr]_v1_[0-9a-f]{64}\b",
    ),
    token(
        "cloudflare-token",
        "A token or key of Cloudflare.",
        &["cloudflare", "CF_API_", "v1.0-"],
        r#"(?:(?i:cloudflare|cf_api_)[\w .-]{0,30}["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?([A-Za-z0-9_-]{40}|[0-9a-f]{37})(?:[^A-Za-z0-9_-]|\z)|v1\.0-[0-9a-f]{24}-[0-9a-f]{146}\b)"#,
    )
    .anywhere()
    .check(|hit| is_token(hit) && has_digit(hit)),
    token(
        "heroku-key",
        "An API key of Heroku.",
        &["heroku", "HRKU-"],
        r#"(?:HRKU-[A-Za-z0-9_-]{36,}|(?i:heroku)[\w .-]{0,30}["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b)"#,
    )
    .anywhere(),
    token(
        "alibaba-access-key",
        "The id of an Alibaba Cloud access key.",
        &["LTAI"],
        r"LTAI[A-Za-z0-9]{17,21}\b",
    )
    .check(|hit| is_token(hit) && has_digit(hit)),
    token(
        "tencent-secret-id",
        "The id of a Tencent Cloud key.",
        &["AKID"],
        r"AKID[A-Za-z0-9]{32}\b",
    )
    .check(|hit| is_token(hit) && has_digit(hit)),
    token(
        "flyio-token",
        "A token of Fly.io.",
        &["fo1_", "fm1a_", "fm1r_", "fm2_"],
        r"(?:fo1_[A-Za-z0-9_-]{43}|fm(?:1[ar]|2)_[A-Za-z0-9+/]{100,}={0,3})",
    ),
    token(
        "netlify-token",
        "A token of Netlify.",
        &["nfp_"],
        r"nfp_[A-Za-z0-9]{36,40}\b",
    ),
    token(
        "planetscale-token",
        "A token or password of PlanetScale.",
        &["pscale_"],
        r"pscale_(?:tkn|pw|oauth)_[A-Za-z0-9_=.-]{32,64}",
    ),
    token(
        "supabase-key",
        "A secret key or access token of Supabase.",
        &["sbp_", "sb_secret_"],
        r"(?:sbp_(?:oauth_)?[0-9a-f]{40}\b|sb_secret_[A-Za-z0-9_-]{31,})",
    ),
    token(
        "tailscale-key",
        "A key of Tailscale.",
        &["tskey-"],
        r"tskey-[a-z]+-[A-Za-z0-9]+-[A-Za-z0-9]{20,}\b",
    ),
    token(
        "vault-token",
        "A token of HashiCorp Vault.",
        &["hvs.", "hvb.", "hvr.", "vault"],
        r#"(?:hv[sbr]\.[A-Za-z0-9_-]{24,}|(?i:vault)[\w .-]{0,30}["'`]{0,2}\s{0,4}(?:=>|:=|=|:)\s{0,4}["'`]?[sbr]\.[A-Za-z0-9]{24}\b)"#,
    )
    .anywhere()
    .check(|hit| is_token(hit) && has_digit(hit)),
    token(
        "terraform-cloud-token",
        "A token of Terraform Cloud.",
        &[".atlasv1."],
        r"[A-Za-z0-9]{14}\.atlasv1\.[A-Za-z0-9_=-]{60,70}",
    )
    .back(14),
    token(
        "pulumi-token",
        "A token of Pulumi.",
        &["pul-"],
        r"pul-[0-9a-f]{40}\b",
    ),
    token(
        "doppler-token",
        "A token of Doppler.",
        &["dp.pt.", "dp.st.", "dp.ct.", "dp.sa.", "dp.scim.", "dp.audit."],
        r"dp\.(?:pt|ct|sa|scim|audit|st\.(?:[a-z0-9_-]{2,35}\.)?)\.?[A-Za-z0-9]{40,44}\b",
    ),
    token(
        "onepassword-token",
        "A service account token or secret key of 1Password.",
        &["ops_eyJ", "A3-"],
        r"(?:ops_eyJ[A-Za-z0-9+/_-]{200,}={0,3}|A3-[A-Z0-9]{6}-(?:[A-Z0-9]{11}|[A-Z0-9]{6}-[A-Z0-9]{5})-[A-Z0-9]{5}-[A-Z0-9]{5}-[A-Z0-9]{5}\b)",
    ),
    token(
        "databricks-token",
        "A token of Databricks.",
        &["dapi"],
        r"dapi[0-9a-f]{32}(?:-[0-9])?\b",
    ),
    token(
        "confluent-secret",
        "An API secret of Confluent Cloud.",
        &["cflt"],
        r"cflt[A-Za-z0-9+/]{60}(?:[^A-Za-z0-9+/=]|\z)",
    ),
];

/// A signature counts in a URL that says until when it is good.
fn is_of_a_signed_url(hit: &Hit<'_>) -> bool {
    let before = &hit.before[hit.before.len().saturating_sub(400)..];
    let after = &hit.after[..hit.after.len().min(400)];
    let near = |needle: &[u8]| value::contains(before, needle) || value::contains(after, needle);
    near(b"se=") && near(b"sv=") && value::is_token(hit.value)
}

fn has_digit(hit: &Hit<'_>) -> bool {
    hit.value.iter().any(u8::is_ascii_digit) && hit.value.iter().any(u8::is_ascii_alphabetic)
}
