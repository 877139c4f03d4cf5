//! What must be found: at least one secret for every rule, in the places that people leave them.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::random::Random;

/// One secret and where it lies.
#[derive(Debug)]
pub(super) struct Planted {
    pub(super) rule: &'static str,
    pub(super) path: &'static str,
    pub(super) text: String,
    /// It is found by the file's path, alone or with its text.
    pub(super) by_path: bool,
    /// The whole file is the finding.
    pub(super) whole: bool,
    /// It has to be at the beginning of a line.
    pub(super) lines: bool,
}

fn text(rule: &'static str, text: impl Into<String>) -> Planted {
    let path = "srv/app/data";
    Planted { rule, path, text: text.into(), by_path: false, whole: false, lines: false }
}

/// Text that means what it does only as lines of its own.
fn lines(rule: &'static str, lines: impl Into<String>) -> Planted {
    Planted { lines: true, ..text(rule, lines) }
}

fn file(rule: &'static str, path: &'static str, content: impl Into<String>) -> Planted {
    Planted { path, by_path: true, ..text(rule, content) }
}

fn whole(rule: &'static str, path: &'static str, content: &str) -> Planted {
    Planted { whole: true, ..file(rule, path, content) }
}

pub(super) fn planted() -> Vec<Planted> {
    let mut r = Random::new(42);
    [keys(&mut r), cloud(&mut r), code(&mut r), services(&mut r), logins(&mut r), files(&mut r)]
        .into_iter()
        .flatten()
        .collect()
}

fn armor(r: &mut Random, kind: &str) -> String {
    let dashes = "-".repeat(5);
    let body = r.armor(4);
    format!("{dashes}BEGIN {kind}{dashes}\n{body}{dashes}END {kind}{dashes}")
}

fn keys(r: &mut Random) -> Vec<Planted> {
    let private = |kind: &str| [kind, "PRIVATE", " KEY"].concat();
    let escaped = armor(r, &private("RSA ")).replace('\n', "\\n");
    let headers = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,8F2B\n\n";
    let begin = ["-----BEGIN RSA PRIVATE", " KEY-----\n"].concat();
    let pgp = ["-----BEGIN PGP PRIVATE", " KEY BLOCK-----\n"].concat();
    vec![
        text("private-key", armor(r, &private(""))),
        text("private-key", armor(r, &private("RSA "))),
        text("private-key", armor(r, &private("EC "))),
        text("private-key", armor(r, &private("DSA "))),
        text("private-key", armor(r, &private("OPENSSH "))),
        text("private-key", armor(r, &private("ENCRYPTED "))),
        text("private-key", armor(r, &private("")).replace('\n', "\r\n")),
        text("private-key", format!("key = \"{escaped}\"")),
        text("private-key", armor(r, &private("")).replace('\n', "\n    ")),
        text("private-key", format!("{begin}{headers}{}", r.armor(4))),
        text("private-key", format!("{pgp}Version: GnuPG v2\n\n{}", r.armor(4))),
        text("private-key", format!("{pgp}\n{}", r.armor(4))),
        text(
            "ssh2-private-key",
            [
                "---- BEGIN SSH2 ENCRYPTED PRIVATE",
                " KEY ----\nComment: \"2048-bit rsa\"\n",
                &r.armor(3),
            ]
            .concat(),
        ),
        text("putty-private-key", ["Private", "-Lines: 3\n", &r.armor(3)].concat()),
        text(
            "age-secret-key",
            ["AGE-SECRET", "-KEY-1", &r.of("ACDEFGHJKLMNPQRSTUVWXYZ023456789", 58)].concat(),
        ),
        text(
            "jwk-private-key",
            format!(
                r#"{{"kty":"EC","crv":"P-256","x":"{}","d":"{}"}}"#,
                URL_SAFE_NO_PAD.encode(r.bytes(32)),
                URL_SAFE_NO_PAD.encode(r.bytes(32))
            ),
        ),
        text(
            "jwk-private-key",
            format!(r#"{{"k":"{}","kty":"oct"}}"#, URL_SAFE_NO_PAD.encode(r.bytes(32))),
        ),
        text("wireguard-private-key", format!("PrivateKey = {}", STANDARD.encode(r.bytes(32)))),
        text("wireguard-private-key", format!("PresharedKey={}", STANDARD.encode(r.bytes(32)))),
        text("tor-secret-key", "== ed25519v1-secret: type0 ==\0\0\0abcdefgh"),
        text(
            "dnssec-private-key",
            format!(
                "Private-key-format: v1.3\nAlgorithm: 13 (ECDSAP256SHA256)\nPrivateKey: {}=",
                r.base64(43)
            ),
        ),
        text("tsig-key", format!("algorithm hmac-sha256; secret \"{}=\";", r.base64(43))),
        text(
            "signify-secret-key",
            format!("untrusted comment: signify secret key\n{}", r.base64(140)),
        ),
    ]
}

fn cloud(r: &mut Random) -> Vec<Planted> {
    vec![
        text("aws-access-key", ["aws_access_key_id = AK", "IA", &r.base32(16)].concat()),
        text("aws-access-key", ["x\",\"AS", "IA", &r.base32(16), "\""].concat()),
        text("aws-secret-key", format!("aws_secret_access_key = {}", r.base64(40))),
        text("aws-secret-key", format!("\"SecretAccessKey\": \"{}\",", r.base64(40))),
        text("aws-secret-key", format!("export AWS_SECRET_ACCESS_KEY={}", r.base64(40))),
        text("aws-session-token", format!("aws_session_token={}==", r.base64(300))),
        text("gcp-api-key", ["key=AI", "za", &r.alnum(35)].concat()),
        text("gcp-service-account", format!("\"private_key_id\": \"{}\",", r.hex(40))),
        text("gcp-oauth-secret", ["GOC", "SPX-", &r.alnum(28)].concat()),
        text("gcp-oauth-token", ["ya", "29.", &r.alnum(120)].concat()),
        text("gcp-oauth-token", ["1/", "/0", &r.alnum(80)].concat()),
        text(
            "azure-storage-key",
            ["DefaultEndpointsProtocol=https;AccountName=a;Account", "Key=", &r.base64(86), "==;"]
                .concat(),
        ),
        text("azure-storage-key", ["SharedAccess", "Key=", &r.base64(43), "="].concat()),
        text("azure-client-secret", [&r.alnum(3), "8Q", "~", &r.alnum(34)].concat()),
        text(
            "azure-sas",
            format!("?sv=2024-11-04&se=2031-01-01T00%3A00Z&sp=r&sig={}%3D", r.alnum(43)),
        ),
        text("azure-devops-token", [&r.alnum(76), "AZ", "DO", &r.alnum(4)].concat()),
        text("digitalocean-token", ["dop", "_v1_", &r.hex(64)].concat()),
        text("cloudflare-token", format!("CLOUDFLARE_API_TOKEN={}", r.alnum(40))),
        text("cloudflare-token", format!("v1.0-{}-{}", r.hex(24), r.hex(146))),
        text("heroku-key", format!("HEROKU_API_KEY={}", r.uuid())),
        text("heroku-key", ["HR", "KU-AA", &r.alnum(58)].concat()),
        text("alibaba-access-key", ["LT", "AI", &r.alnum(20)].concat()),
        text("tencent-secret-id", ["AK", "ID", &r.alnum(32)].concat()),
        text("flyio-token", ["fo", "1_", &r.alnum(43)].concat()),
        text("flyio-token", ["FlyV1 fm", "2_", &r.base64(200)].concat()),
        text("netlify-token", ["nf", "p_", &r.alnum(36)].concat()),
        text("planetscale-token", ["pscale", "_pw_", &r.alnum(43)].concat()),
        text("supabase-key", ["sb", "p_", &r.hex(40)].concat()),
        text("supabase-key", ["sb_", "secret_", &r.alnum(31)].concat()),
        text("tailscale-key", ["ts", "key-auth-", &r.alnum(17), "-", &r.alnum(32)].concat()),
        text("vault-token", ["hv", "s.", &r.alnum(90)].concat()),
        text("vault-token", format!("VAULT_TOKEN=s.{}", r.alnum(24))),
        text("terraform-cloud-token", [&r.alnum(14), ".atlas", "v1.", &r.alnum(67)].concat()),
        text("pulumi-token", ["pu", "l-", &r.hex(40)].concat()),
        text("doppler-token", ["dp", ".pt.", &r.alnum(43)].concat()),
        text("doppler-token", ["dp", ".st.dev.", &r.alnum(43)].concat()),
        text("onepassword-token", ["ops", "_eyJ", &r.base64(300)].concat()),
        text(
            "onepassword-token",
            ["A", "3-", &r.upper(6), "-", &r.upper(6), "-", &r.upper(5), "-", &r.upper(5)].concat()
                + &["-", &r.upper(5), "-", &r.upper(5)].concat(),
        ),
        text("databricks-token", ["da", "pi", &r.hex(32), "-2"].concat()),
        text("confluent-secret", ["cf", "lt", &r.base64(60)].concat()),
    ]
}

fn code(r: &mut Random) -> Vec<Planted> {
    vec![
        text("github-token", ["gh", "p_", &r.alnum(36)].concat()),
        text("github-token", ["a='gh", "o_", &r.alnum(36), "'"].concat()),
        text("github-token", ["gh", "s_", &r.alnum(36)].concat()),
        text("github-token", ["\\ngh", "r_", &r.alnum(76), "\\n"].concat()),
        text(
            "github-fine-grained-token",
            ["github", "_pat_", &r.alnum(22), "_", &r.alnum(59)].concat(),
        ),
        text("gitlab-token", ["gl", "pat-", &r.alnum(20)].concat()),
        text("gitlab-token", ["gl", "rt-t1_", &r.alnum(20)].concat()),
        text("gitlab-token", ["GR", "1348941", &r.alnum(20)].concat()),
        text("atlassian-token", ["ATA", "TT3", &r.alnum(186)].concat()),
        text("atlassian-token", ["AT", "BB", &r.alnum(32)].concat()),
        text("npm-token", ["np", "m_", &r.alnum(36)].concat()),
        text("npmrc-auth", format!("//registry.npmjs.org/:_authToken={}", r.uuid())),
        text("npmrc-auth", format!("//r.corp.net/:_auth={}", r.base64(40))),
        text("pypi-token", ["pypi-", "AgEIcHlwaS5vcmc", &r.alnum(150)].concat()),
        text("rubygems-key", ["ruby", "gems_", &r.hex(48)].concat()),
        text("crates-io-token", ["ci", "o", &r.alnum(32)].concat()),
        text("nuget-key", ["oy", "2", &r.lower(43)].concat()),
        text("clojars-token", ["CLO", "JARS_", &r.lower(60)].concat()),
        text("docker-token", ["dckr", "_pat_", &r.alnum(27)].concat()),
        text("artifactory-key", ["AK", "Cp", &r.alnum(69)].concat()),
        text("circleci-token", ["CCI", "PAT_", &r.alnum(22), "_", &r.hex(40)].concat()),
        text("buildkite-token", ["bk", "ua_", &r.hex(40)].concat()),
        text("sonarqube-token", ["sq", "u_", &r.hex(40)].concat()),
        text("postman-key", ["PM", "AK-", &r.hex(24), "-", &r.hex(34)].concat()),
        text("sourcegraph-token", ["sg", "p_", &r.hex(40)].concat()),
    ]
}

fn services(r: &mut Random) -> Vec<Planted> {
    vec![
        text("anthropic-key", ["sk-", "ant-api03-", &r.alnum(93), "AA"].concat()),
        text("anthropic-key", ["sk-", "ant-oat01-", &r.alnum(93), "AA"].concat()),
        text("openai-key", ["sk", "-", &r.alnum(20), "T3Blb", "kFJ", &r.alnum(20)].concat()),
        text("openai-key", ["sk-", "proj-", &r.alnum(156)].concat()),
        text("openrouter-key", ["sk-", "or-v1-", &r.hex(64)].concat()),
        text("huggingface-token", ["h", "f_", &r.letters(34)].concat()),
        text("groq-key", ["gs", "k_", &r.alnum(52)].concat()),
        text("xai-key", ["xa", "i-", &r.alnum(80)].concat()),
        text("nvidia-key", ["nv", "api-", &r.alnum(64)].concat()),
        text("perplexity-key", ["pp", "lx-", &r.alnum(48)].concat()),
        text("replicate-token", ["r", "8_", &r.alnum(37)].concat()),
        text("langsmith-key", ["ls", "v2_pt_", &r.hex(32), "_", &r.hex(10)].concat()),
        text(
            "slack-token",
            ["xo", "xb-", &r.digits(12), "-", &r.digits(12), "-", &r.alnum(24)].concat(),
        ),
        text(
            "slack-token",
            ["xa", "pp-1-A0", &r.upper(9), "-", &r.digits(13), "-", &r.hex(64)].concat(),
        ),
        text(
            "slack-webhook",
            [
                "https://hooks.",
                "slack.com/services/T",
                &r.upper(8),
                "/B",
                &r.upper(8),
                "/",
                &r.alnum(24),
            ]
            .concat(),
        ),
        text(
            "discord-webhook",
            ["https://discord.com/api/", "webhooks/", &r.digits(18), "/", &r.alnum(68)].concat(),
        ),
        text(
            "discord-token",
            ["DISCORD_TOKEN=M", &r.alnum(23), ".", &r.alnum(6), ".", &r.alnum(38)].concat(),
        ),
        text(
            "teams-webhook",
            format!(
                "https://corp.webhook.{}/webhookb2/{}@{}/IncomingWebhook/{}/{}",
                "office.com",
                r.uuid(),
                r.uuid(),
                r.hex(32),
                r.uuid()
            ),
        ),
        text("telegram-token", [&r.digits(10), ":A", "A", &r.alnum(33)].concat()),
        text("twilio-key", ["S", "K", &r.hex(32)].concat()),
        text("sendgrid-key", ["S", "G.", &r.alnum(22), ".", &r.alnum(43)].concat()),
        text("mailgun-key", ["ke", "y-", &r.hex(32)].concat()),
        text("mailchimp-key", [&r.hex(32), "-u", "s12"].concat()),
        text("brevo-key", ["xkey", "sib-", &r.hex(64), "-", &r.alnum(16)].concat()),
        text("resend-key", ["r", "e_", &r.alnum(8), "_", &r.alnum(24)].concat()),
        text("stripe-key", ["sk_", "live_", &r.alnum(24)].concat()),
        text("stripe-key", ["rk_", "live_", &r.alnum(99)].concat()),
        text("stripe-key", ["wh", "sec_", &r.alnum(32)].concat()),
        text("square-token", ["EA", "AA", &r.alnum(60)].concat()),
        text("square-token", ["sq0", "csp-", &r.alnum(43)].concat()),
        text("shopify-token", ["shp", "at_", &r.hex(32)].concat()),
        text("facebook-token", ["EA", "AG", &r.alnum(150)].concat()),
        text("dropbox-token", ["s", "l.u.", &r.alnum(140)].concat()),
        text("datadog-key", format!("DD_API_KEY={}", r.hex(32))),
        text("datadog-key", format!("datadog.app_key: {}", r.hex(40))),
        text("new-relic-key", ["NR", "AK-", &r.upper(27)].concat()),
        text("new-relic-license-key", [&r.hex(36), "NR", "AL"].concat()),
        text("sentry-token", ["sn", "tryu_", &r.hex(64)].concat()),
        text("sentry-token", ["sn", "trys_eyJ", &r.base64(120)].concat()),
        text("grafana-token", ["gl", "sa_", &r.alnum(32), "_", &r.hex(8)].concat()),
        text("dynatrace-token", ["dt", "0c01.", &r.upper(24), ".", &r.upper(64)].concat()),
        text("linear-key", ["lin", "_api_", &r.alnum(40)].concat()),
        text("notion-token", ["nt", "n_", &r.digits(11), &r.alnum(35)].concat()),
        text("notion-token", ["sec", "ret_", &r.alnum(43)].concat()),
        text("figma-token", ["fi", "gd_", &r.alnum(40)].concat()),
        text("airtable-token", ["AIRTABLE_KEY=pa", "t", &r.alnum(14), ".", &r.hex(64)].concat()),
    ]
}

fn logins(r: &mut Random) -> Vec<Planted> {
    let part = |json: &str| URL_SAFE_NO_PAD.encode(json);
    let header = part(r#"{"alg":"HS256","typ":"JWT"}"#);
    let claims = part(r#"{"sub":"build-robot","iat":1790000000}"#);
    let long = part(&format!(r#"{{"sub":"robot","groups":"{}"}}"#, r.alnum(4000)));
    let login = STANDARD.encode(format!("robot:{}", r.alnum(12)));
    vec![
        text("jwt", format!("{header}.{claims}.{}", r.alnum(43))),
        text("jwt", format!("{header}.{long}.{}", r.alnum(43))),
        text("database-url", format!("postgres://app:{}@db.corp.net:5432/app", r.alnum(12))),
        text("database-url", "mysql+pymysql://root:hunter2@10.0.0.7/app"),
        text("database-url", format!("redis://:{}@cache.corp.net:6379", r.alnum(20))),
        text("database-url", format!("mongodb+srv://u:{}@c0.mongodb.net/x", r.alnum(16))),
        text("url-password", format!("https://robot:{}@git.corp.net/x.git", r.alnum(10))),
        text("url-password", format!("https://{}@git.corp.net/x.git", r.hex(40))),
        text("url-password", "ftp://deploy:hunter22@files.corp.net/"),
        text("authorization-header", format!("Authorization: Bearer {}", r.alnum(40))),
        text("authorization-header", format!("-H \"Authorization: Basic {login}\"")),
        text("authorization-header", format!("'Authorization' => 'token {}'", r.hex(40))),
        text("curl-user", "RUN curl -fsSL -u robot:kX9mmQe3 https://corp.net/x"),
        text("sshpass-password", "sshpass -p 'kX9mmQe3' ssh host"),
        text(
            "password-hash",
            format!("root:$6${}${}:19000:0:99999:7:::", r.alnum(16), r.alnum(86)),
        ),
        text("password-hash", format!("root:$y$j9T${}${}:19000::", r.alnum(22), r.alnum(43))),
        text("password-hash", format!("admin:$apr1${}${}", r.alnum(8), r.alnum(22))),
        text("password-hash", format!("admin:$2y$05${}", r.alnum(53))),
        text("password-hash", format!("admin:{{SHA}}{}=", r.base64(27))),
        text("netrc-password", "machine git.corp.net login robot password kX9mmQe3"),
        text("netrc-password", "machine git.corp.net\n  login robot\n  password kX9mmQe3"),
        text("docker-login", format!(r#"{{"auths":{{"r.corp.net":{{"auth":"{login}"}}}}}}"#)),
        text("docker-login", format!(r#""identitytoken": "{}""#, r.alnum(64))),
        text("kubeconfig-key", format!("    client-key-data: {}==", r.base64(600)).trim_start()),
        lines("kubeconfig-key", format!("user:\n    as: robot\n    token: {}", r.alnum(40))),
        lines("kubeconfig-key", "user:\n    password: kX9mmQe3\n    username: robot"),
        text("secret-assignment", format!("password = \"{}\"", r.alnum(20))),
        text("secret-assignment", format!("DB_PASSWORD={}", r.alnum(20))),
        text("secret-assignment", "const dbPassword = 'kX9!mmQe';"),
        text("secret-assignment", format!("secret_key: {}", r.hex(64))),
        text("secret-assignment", format!("SECRET_KEY_BASE={}", r.hex(128))),
        text("secret-assignment", format!("  \"apiKey\": \"{}\",", r.alnum(32))),
        text("secret-assignment", format!("client_secret => '{}'", r.alnum(32))),
        text("secret-assignment", format!("<password>{}</password>", r.alnum(18))),
        text("secret-assignment", format!("define('AUTH_KEY', '{}');", r.alnum(40))),
        text("secret-assignment", format!("{{\\\"token\\\":\\\"{}\\\"}}", r.alnum(32))),
        text("secret-assignment", format!("deploy --auth-token {} --now", r.alnum(32))),
        text("secret-assignment", format!("private_key := `{}`", r.base64(44))),
        text("secret-assignment", format!("set access-key=\"{}\"", r.alnum(24))),
        text("secret-assignment", format!("GITHUB_TOKEN_CI={}", r.alnum(32))),
        text("secret-assignment", format!("passphrase: \"{}\"", r.alnum(24))),
    ]
}

fn files(r: &mut Random) -> Vec<Planted> {
    vec![
        whole("shell-history", "root/.bash_history", "ls -l"),
        whole("shell-history", "home/u/.zsh_history", "ls -l"),
        whole("shell-history", "/root/.python_history", "import os"),
        whole("shell-history", "root/.psql_history", "\\d"),
        whole("key-store", "srv/tls/server.p12", "\u{1}\u{2}"),
        whole("key-store", "srv/app/release.keystore", "\u{1}\u{2}"),
        whole("cloud-credentials", "root/.aws/credentials", "[default]"),
        whole("cloud-credentials", "root/.config/gcloud/credentials.db", "SQLite format 3"),
        whole("cloud-credentials", "root/.azure/msal_token_cache.json", "{ }"),
        whole("login-session", "root/.git-credentials", "x"),
        whole("login-session", "root/.vault-token", "x"),
        whole("database-password-file", "root/.pgpass", "h:5432:d:u:p"),
        whole("rails-master-key", "srv/app/config/master.key", "x"),
        whole("browser-store", "root/.mozilla/firefox/a.default/logins.json", "{}"),
        file("env-file", "srv/app/.env", "DB_PASSWORD=postgres"),
        file("env-file", "srv/app/.env.production", "STRIPE_KEY='abcd1234'"),
        file("env-file", "srv/app/.envrc", "export API_TOKEN=hunter2"),
        file("terraform-secret", "srv/infra/terraform.tfstate", "\"password\": \"simple\","),
        file("terraform-secret", "srv/infra/prod.tfvars", "db_password = \"simple\""),
        file("package-registry-password", "root/.pypirc", "password = simple"),
        file("package-registry-password", "root/.cargo/credentials.toml", "token = \"simple\""),
        file("package-registry-password", "root/.m2/settings.xml", "<password>simple</password>"),
        file("credentials-file", "root/.my.cnf", "password=simple"),
        file("credentials-file", "root/.config/rclone/rclone.conf", "secret_access_key = simple"),
        file("credentials-file", "root/.config/gh/hosts.yml", "oauth_token: simple1"),
        file("credentials-file", "root/.kube/config", format!("    token: {}", r.alnum(12))),
        file(
            "credentials-file",
            "etc/NetworkManager/system-connections/home.nmconnection",
            "psk=simple12",
        ),
    ]
}
