//! Files that are secrets, or hold them, by their path: what programs have agreed to call them.
//!
//! Some are a finding as soon as they hold anything; in others any value counts that has a secret's
//! name, however simple it is. Names are compared without regard to case.

use super::Rule;

/// How the content of a file is to be read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Nothing is known of it.
    Plain,
    /// Not a file: a text of an image's config.
    Text,
    /// Digests of packages, by the thousand.
    Lock,
    /// A finding as such, unless it is empty.
    Whole(Rule),
    /// Each value with a secret's name is a finding.
    Settings(Rule),
}

/// What a path has to be like.
#[derive(Debug)]
pub(super) enum Path {
    /// The last name.
    Name(&'static str),
    /// How the last name begins.
    Begins(&'static str),
    /// How the last name ends.
    Ends(&'static str),
    /// The last names, with their slashes.
    At(&'static str),
    /// Some folder above.
    In(&'static str),
}

use Path::{At, Begins, Ends, In, Name};

/// What is made of a file whose path matches.
#[derive(Debug)]
enum Read {
    Whole,
    Settings,
}

/// Files of one kind.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) rule: Rule,
    read: Read,
    paths: &'static [Path],
}

const fn whole(id: &'static str, finds: &'static str, paths: &'static [Path]) -> Named {
    Named { rule: Rule { id, finds }, read: Read::Whole, paths }
}

const fn settings(id: &'static str, finds: &'static str, paths: &'static [Path]) -> Named {
    Named { rule: Rule { id, finds }, read: Read::Settings, paths }
}

/// All files that are known by their path; the first that matches counts.
pub(super) const ALL: &[Named] = &[
    whole(
        "shell-history",
        "What was typed into a shell, an interpreter or a database client.",
        &[
            Name(".bash_history"),
            Name(".zsh_history"),
            Name(".zhistory"),
            Name(".sh_history"),
            Name(".ash_history"),
            Name(".ksh_history"),
            Name(".tcsh_history"),
            Name(".history"),
            Name(".histfile"),
            Name("fish_history"),
            Name("ConsoleHost_history.txt"),
            Name(".python_history"),
            Name(".node_repl_history"),
            Name(".irb_history"),
            Name(".pry_history"),
            Name(".php_history"),
            Name(".Rhistory"),
            Name(".scala_history"),
            Name(".psql_history"),
            Name(".mysql_history"),
            Name(".mariadb_history"),
            Name(".sqlite_history"),
            Name(".rediscli_history"),
            Name(".mongosh_repl_history"),
            Name(".dbshell"),
            At("/.ipython/profile_default/history.sqlite"),
        ],
    ),
    whole(
        "key-store",
        "A file of keys behind a password: PKCS#12, Java, KeePass, Kerberos, GnuPG.",
        &[
            Ends(".p12"),
            Ends(".pfx"),
            Ends(".jks"),
            Ends(".keystore"),
            Ends(".bks"),
            Ends(".kdbx"),
            Ends(".keytab"),
            Name("krb5.keytab"),
            Name("secring.gpg"),
            In("/.gnupg/private-keys-v1.d/"),
            In("/.local/share/keyrings/"),
            In("/Library/Keychains/"),
        ],
    ),
    whole(
        "cloud-credentials",
        "What a cloud's command line keeps after a login.",
        &[
            At("/.aws/credentials"),
            In("/.aws/sso/cache/"),
            In("/.aws/cli/cache/"),
            At("/.azure/accessTokens.json"),
            At("/.azure/msal_token_cache.json"),
            At("/.azure/msal_token_cache.bin"),
            At("/.azure/service_principal_entries.json"),
            At("/.azure/service_principal_entries.bin"),
            At("/gcloud/credentials.db"),
            At("/gcloud/access_tokens.db"),
            At("/gcloud/application_default_credentials.json"),
            In("/gcloud/legacy_credentials/"),
            In("/.oci/sessions/"),
            At("/.config/doctl/config.yaml"),
            At("/.fly/config.yml"),
            At("/.bluemix/config.json"),
            At("/.aliyun/config.json"),
        ],
    ),
    whole(
        "login-session",
        "What a tool keeps after a login: code hosts, password managers, Vault, Terraform.",
        &[
            Name(".git-credentials"),
            At("/.config/git/credentials"),
            Name(".vault-token"),
            At("/.terraform.d/credentials.tfrc.json"),
            At("/.config/op/config"),
            At("/.op/config"),
            In("/.config/op/sessions/"),
            In("/.kube/cache/oidc-login/"),
            At("/huggingface/token"),
            At("/huggingface/stored_tokens"),
            At("/.kaggle/kaggle.json"),
            At("/.claude/.credentials.json"),
            At("/.codex/auth.json"),
        ],
    ),
    whole(
        "database-password-file",
        "Passwords for database servers, as their clients read them.",
        &[Name(".pgpass"), Name(".mylogin.cnf"), Name(".dbeaver-credentials")],
    ),
    whole(
        "rails-master-key",
        "The key to a Rails application's encrypted credentials.",
        &[Name("master.key"), At("/credentials/production.key"), At("/credentials/staging.key")],
    ),
    whole(
        "browser-store",
        "Passwords and sessions that a browser keeps.",
        &[
            Name("logins.json"),
            Name("key4.db"),
            Name("cookies.sqlite"),
            Name("Login Data"),
            At("/Default/Cookies"),
            At("/Network/Cookies"),
        ],
    ),
    settings(
        "env-file",
        "A `.env` file that gives a value to a name which says password, token or key.",
        &[Name(".env"), Begins(".env."), Ends(".env"), Name(".envrc"), Name(".flaskenv")],
    ),
    settings(
        "terraform-secret",
        "A secret in Terraform's state or variables.",
        &[
            Ends(".tfstate"),
            Ends(".tfstate.backup"),
            Ends(".tfvars"),
            Ends(".tfvars.json"),
            Name(".terraformrc"),
        ],
    ),
    settings(
        "package-registry-password",
        "A password or token for a package registry, in the settings of pip, npm, Cargo and others.",
        &[
            Name(".pypirc"),
            Name("pip.conf"),
            Name(".npmrc"),
            Name(".yarnrc"),
            Name(".yarnrc.yml"),
            At("/.cargo/credentials"),
            At("/.cargo/credentials.toml"),
            At("/.gem/credentials"),
            At("/.bundle/config"),
            At("/.m2/settings.xml"),
            At("/.gradle/gradle.properties"),
            At("/.composer/auth.json"),
            At("/composer/auth.json"),
            At("/NuGet/NuGet.Config"),
            At("/pypoetry/auth.toml"),
        ],
    ),
    settings(
        "credentials-file",
        "A secret in the settings of a tool that reads one from there.",
        &[
            Name(".netrc"),
            Name("_netrc"),
            Name(".my.cnf"),
            Name(".s3cfg"),
            Name(".boto"),
            Name(".passwd-s3fs"),
            Name(".muttrc"),
            Name(".msmtprc"),
            Name(".fetchmailrc"),
            Name("rclone.conf"),
            Name("wp-config.php"),
            Name("secrets.yml"),
            Name("secrets.yaml"),
            Name("credentials.json"),
            Ends(".nmconnection"),
            Name("wpa_supplicant.conf"),
            Begins("wpa_supplicant-"),
            At("/.kube/config"),
            Ends(".kubeconfig"),
            Name("kubeconfig"),
            At("/gh/hosts.yml"),
            At("/glab-cli/config.yml"),
            At("/.config/hub"),
            At("/.docker/config.json"),
            At("/containers/auth.json"),
            At("/.heroku/credentials"),
            At("/ngrok/ngrok.yml"),
            At("/.databrickscfg"),
            At("/.snowflake/config.toml"),
        ],
    ),
];

/// Ends of names that are examples for others, or hold what everybody may know.
const EXAMPLES: &[&str] =
    &[".example", ".sample", ".template", ".tmpl", ".dist", ".defaults", ".schema", ".md"];

/// Key stores with nothing but public certificates.
const TRUST: &[&str] = &["trust", "cacerts", "keyring-public"];

const LOCKS: &[&str] = &[
    "cargo.lock",
    "package-lock.json",
    "npm-shrinkwrap.json",
    ".package-lock.json",
    "yarn.lock",
    "pnpm-lock.yaml",
    "bun.lock",
    "go.sum",
    "poetry.lock",
    "uv.lock",
    "pdm.lock",
    "pipfile.lock",
    "composer.lock",
    "gemfile.lock",
    "flake.lock",
    "packages.lock.json",
    "mix.lock",
    "podfile.lock",
    "pubspec.lock",
];

/// Says how a file is to be read, by its path; with or without a slash at its beginning.
pub(super) fn kind_of(path: &[u8]) -> Kind {
    let mut path = path.to_ascii_lowercase();
    if !path.starts_with(b"/") {
        path.insert(0, b'/');
    }
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    if LOCKS.iter().any(|lock| name == lock.as_bytes()) {
        return Kind::Lock;
    }
    if EXAMPLES.iter().any(|example| name.ends_with(example.as_bytes())) {
        return Kind::Plain;
    }
    let named = ALL.iter().find(|named| named.paths.iter().any(|pattern| pattern.is(&path, name)));
    match named {
        None => Kind::Plain,
        Some(named) => match named.read {
            Read::Whole
                if TRUST.iter().any(|word| super::value::contains(name, word.as_bytes())) =>
            {
                Kind::Plain
            }
            Read::Whole => Kind::Whole(named.rule),
            Read::Settings => Kind::Settings(named.rule),
        },
    }
}

impl Path {
    /// Says whether a path in lower case, and its last name, are like this.
    fn is(&self, path: &[u8], name: &[u8]) -> bool {
        match self {
            Name(wanted) => name.eq_ignore_ascii_case(wanted.as_bytes()),
            Begins(start) => {
                name.get(..start.len()).is_some_and(|s| s.eq_ignore_ascii_case(start.as_bytes()))
            }
            Ends(end) => {
                let from = name.len().checked_sub(end.len());
                from.is_some_and(|from| name[from..].eq_ignore_ascii_case(end.as_bytes()))
            }
            At(end) => {
                let from = path.len().checked_sub(end.len());
                from.is_some_and(|from| path[from..].eq_ignore_ascii_case(end.as_bytes()))
            }
            In(folder) => super::value::contains(path, folder.to_ascii_lowercase().as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(path: &str) -> String {
        match kind_of(path.as_bytes()) {
            Kind::Plain | Kind::Text => "plain".to_owned(),
            Kind::Lock => "lock".to_owned(),
            Kind::Whole(rule) => rule.id.to_owned(),
            Kind::Settings(rule) => format!("settings of {}", rule.id),
        }
    }

    #[test]
    fn files_are_known_by_their_path() {
        for (path, kind) in [
            ("/root/.bash_history", "shell-history"),
            ("root/.zsh_history", "shell-history"),
            ("/home/u/.local/share/fish/fish_history", "shell-history"),
            ("/srv/tls/Server.P12", "key-store"),
            ("/usr/lib/jvm/lib/security/truststore.jks", "plain"),
            ("/home/u/.aws/credentials", "cloud-credentials"),
            ("/srv/app/credentials", "plain"),
            ("/root/.gnupg/private-keys-v1.d/0a.key", "key-store"),
            ("/srv/app/.env", "settings of env-file"),
            ("/srv/app/.env.production", "settings of env-file"),
            ("/srv/app/.env.example", "plain"),
            ("/srv/app/environment", "plain"),
            ("/srv/app/config/master.key", "rails-master-key"),
            ("/srv/app/Cargo.lock", "lock"),
            ("/root/.npmrc", "settings of package-registry-password"),
            ("/srv/infra/terraform.tfstate", "settings of terraform-secret"),
        ] {
            assert_eq!(told(path), kind, "{path}");
        }
    }
}
