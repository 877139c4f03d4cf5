//! What of the laptop's own system is served, and what never is: two lists, as data.
//!
//! The allow list names folders; inside them only what every user may read is considered (files
//! o+r, folders o+rx), and of that the deny list takes away what holds secrets by habit. A secret
//! outside of the allow list needs no rule: it is not in the image. The invariant: a rule may only
//! ever take away.

use std::collections::BTreeMap;

/// A folder (or file, or symlink) that is part of the image, relative to `/` or to the home.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// Path without a leading slash.
    pub path: &'static str,
    /// Why it is in.
    pub why: &'static str,
}

const fn allow(path: &'static str, why: &'static str) -> Allowed {
    Allowed { path, why }
}

/// System folders that are served.
pub const SYSTEM: &[Allowed] = &[
    allow("usr", "programs, libraries, headers, their data; /usr/local too"),
    allow("bin", "often a symlink into usr"),
    allow("sbin", "often a symlink into usr"),
    allow("lib", "often a symlink into usr"),
    allow("lib32", "often a symlink into usr"),
    allow("lib64", "the program loader's path"),
    allow("libx32", "often a symlink into usr"),
    allow("etc", "names of users, alternatives, certificates, configuration of tools"),
    allow("opt", "programs from outside of the distribution"),
    allow("nix/store", "programs on NixOS, or of Nix beside another system"),
    allow("gnu/store", "programs on Guix"),
    allow("home/linuxbrew/.linuxbrew", "Homebrew on Linux"),
    allow("var/lib/dpkg", "so that dpkg -s and -L and what asks them know what is installed"),
];

/// Toolchain folders in the user's home that are served.
pub const HOME: &[Allowed] = &[
    allow(".cargo/bin", "rustup's proxies, cargo install"),
    allow(".cargo/env", "PATH for shells"),
    allow(".cargo/config", "source replacement; served only without tokens in it"),
    allow(".cargo/config.toml", "source replacement; served only without tokens in it"),
    allow(".cargo/registry", "crates already downloaded: a sandbox without network builds"),
    allow(".cargo/git", "git dependencies already downloaded"),
    allow(".rustup", "Rust toolchains"),
    allow(".local/bin", "the user's own programs"),
    allow(".local/lib", "pip install --user"),
    allow(".local/pipx", "Python programs, older pipx"),
    allow(".local/share/pipx", "Python programs"),
    allow(".local/share/uv/python", "Python versions"),
    allow(".local/share/uv/tools", "Python programs"),
    allow(".local/share/mise", "tool versions"),
    allow(".local/share/fnm", "Node versions"),
    allow(".local/share/pnpm", "Node programs"),
    allow(".local/share/swiftly", "Swift toolchains"),
    allow(".pyenv", "Python versions"),
    allow(".rye", "Python versions"),
    allow(".rbenv", "Ruby versions"),
    allow(".rvm", "Ruby versions"),
    allow(".nvm", "Node versions"),
    allow(".volta", "Node versions"),
    allow(".npm-global", "Node programs"),
    allow(".yarn/bin", "Node programs"),
    allow(".bun/bin", "Bun"),
    allow(".deno/bin", "Deno"),
    allow(".asdf", "tool versions"),
    allow(".sdkman", "Java toolchains"),
    allow(".jenv", "Java versions"),
    allow(".m2/repository", "Maven artefacts already downloaded"),
    allow(".m2/wrapper", "Maven itself"),
    allow(".gradle/wrapper", "Gradle itself"),
    allow(".gradle/caches/modules-2", "Gradle artefacts already downloaded"),
    allow("go", "Go programs and modules already downloaded"),
    allow(".go", "Go toolchain"),
    allow(".gvm", "Go versions"),
    allow(".ghcup", "Haskell toolchains"),
    allow(".cabal/bin", "Haskell programs"),
    allow(".opam", "OCaml toolchains"),
    allow(".juliaup", "Julia versions"),
    allow(".julia/juliaup", "Julia versions"),
    allow(".elan", "Lean toolchains"),
    allow(".dotnet", ".NET toolchains"),
    allow(".swiftpm/bin", "Swift programs"),
    allow(".zig", "Zig toolchain"),
    allow(".wasmtime", "WebAssembly runtime"),
    allow(".wasmer/bin", "WebAssembly runtime"),
    allow(".linuxbrew", "Homebrew in the home"),
    allow(".nix-profile", "symlink to the user's Nix programs"),
    allow("miniconda3", "Conda"),
    allow("anaconda3", "Conda"),
    allow("miniforge3", "Conda"),
    allow("mambaforge", "Conda"),
    allow("micromamba", "Conda"),
];

/// Empty folders that the guest needs to mount on or to write in, with their modes.
pub const EMPTY_FOLDERS: &[(&str, u16)] = &[
    ("proc", 0o555),
    ("sys", 0o555),
    ("dev", 0o755),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("mnt", 0o755),
    ("media", 0o755),
    ("srv", 0o755),
    ("boot", 0o755),
    ("home", 0o755),
    ("root", 0o700),
    ("var/cache", 0o755),
    ("var/lib", 0o755),
    ("var/log", 0o755),
    ("var/mail", 0o755),
    ("var/spool", 0o755),
    ("var/tmp", 0o1777),
    ("var/opt", 0o755),
    ("var/local", 0o755),
];

/// Empty files that stand for what the sandbox has of its own, so that it can be mounted over.
pub const EMPTY_FILES: &[&str] =
    &["etc/hostname", "etc/hosts", "etc/machine-id", "etc/resolv.conf"];

/// Symlinks that every system has under /var.
pub const SYMLINKS: &[(&str, &str)] = &[("var/run", "/run"), ("var/lock", "/run/lock")];

/// What a deny rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// A path relative to `/`, and all that is in it.
    Path(&'static str),
    /// A path relative to the home, and all that is in it.
    HomePath(&'static str),
    /// Any entry of this name, wherever it is. Compared without regard to ASCII case.
    Name(&'static str),
    /// A regular file or symlink of this name; a folder of that name (source code of a client
    /// library has such) stays.
    FileName(&'static str),
    /// Any entry whose name begins so.
    Prefix(&'static str),
    /// Any entry whose name ends so.
    Suffix(&'static str),
    /// Any entry of this name in a home folder, but not under `.cargo/git`.
    HomeName(&'static str),
    /// Any entry under `/etc` whose name begins so.
    EtcPrefix(&'static str),
    /// Any entry under `/etc` whose name ends so.
    EtcSuffix(&'static str),
}

/// What is never served even if every user may read it.
pub const DENY: &[(Denied, &str)] = {
    use Denied::{EtcPrefix, EtcSuffix, FileName, HomeName, HomePath, Name, Path, Prefix, Suffix};
    &[
        // Accounts and privileges of the machine.
        (EtcPrefix("shadow"), "password hashes"),
        (EtcPrefix("gshadow"), "group password hashes"),
        (EtcPrefix("sudoers"), "who may become root"),
        (Path("etc/security/opasswd"), "old password hashes"),
        (Path("etc/.pwd.lock"), "lock of the account files"),
        (EtcPrefix("krb5.keytab"), "Kerberos host keys"),
        (Suffix(".keytab"), "Kerberos keys"),
        (Path("etc/machine-id"), "identifies the machine; the sandbox has its own"),
        (EtcPrefix("ssh_host_"), "host keys of ssh"),
        (Path("etc/sssd"), "directory credentials"),
        (Path("etc/samba"), "file server credentials"),
        (Path("etc/pam_ldap.secret"), "directory credentials"),
        (Path("etc/libnss-ldap.secret"), "directory credentials"),
        (EtcPrefix("ldap.secret"), "directory credentials"),
        // Keys and networks under /etc.
        (Path("etc/ssl/private"), "private keys"),
        (Path("etc/pki/tls/private"), "private keys"),
        (Path("etc/letsencrypt"), "private keys"),
        (EtcPrefix("id_"), "ssh private keys"),
        (EtcSuffix(".key"), "private keys"),
        (Path("etc/NetworkManager/system-connections"), "wireless and VPN passwords"),
        (Path("etc/netplan"), "wireless passwords"),
        (Path("etc/wpa_supplicant"), "wireless passwords"),
        (Path("etc/iwd"), "wireless passwords"),
        (Path("etc/wireguard"), "VPN keys"),
        (Path("etc/openvpn"), "VPN keys"),
        (EtcPrefix("ipsec."), "VPN keys"),
        (Path("etc/ipsec.d"), "VPN keys"),
        (Path("etc/swanctl"), "VPN keys"),
        (Path("etc/ppp"), "dial-up and VPN passwords"),
        (Path("etc/cups"), "printer passwords"),
        // Mounts, mail, databases, services.
        (Path("etc/fstab"), "may hold mount passwords; the sandbox has its own mounts"),
        (Path("etc/crypttab"), "disk encryption"),
        (Path("etc/apt/auth.conf"), "package archive passwords"),
        (Path("etc/apt/auth.conf.d"), "package archive passwords"),
        (EtcPrefix("smbcredentials"), "file server passwords"),
        (EtcPrefix("msmtprc"), "mail passwords"),
        (Path("etc/exim4/passwd.client"), "mail passwords"),
        (Path("etc/postfix/sasl_passwd"), "mail passwords"),
        (Path("etc/mysql/debian.cnf"), "database password"),
        (Path("etc/bacula"), "backup passwords"),
        (Path("etc/restic"), "backup passwords"),
        (Path("etc/borgmatic"), "backup passwords"),
        (Path("etc/rancher"), "cluster credentials"),
        (Path("etc/kubernetes"), "cluster credentials"),
        (Path("etc/docker"), "registry and daemon credentials"),
        (Path("etc/containers/auth.json"), "registry credentials"),
        (Path("etc/gitlab-runner"), "runner token"),
        (Path("etc/salt/pki"), "private keys"),
        (Path("etc/puppetlabs"), "private keys"),
        (Path("etc/polkit-1"), "who may do what on the machine"),
        (Path("usr/local/etc/ssl/private"), "private keys"),
        // Keys anywhere.
        (Prefix("id_rsa"), "ssh private key"),
        (Prefix("id_dsa"), "ssh private key"),
        (Prefix("id_ecdsa"), "ssh private key"),
        (Prefix("id_ed25519"), "ssh private key"),
        (Prefix("id_xmss"), "ssh private key"),
        (FileName("identity"), "ssh private key, old name"),
        (Suffix(".ppk"), "ssh private key of PuTTY"),
        (Suffix(".p12"), "private key with certificate"),
        (Suffix(".pfx"), "private key with certificate"),
        (Suffix(".jks.secret"), "key store password"),
        (Suffix(".kdbx"), "password data base"),
        (Suffix(".kdb"), "password data base"),
        (Suffix(".keyring"), "desktop key ring"),
        (Suffix(".agekey"), "private key of age"),
        (Name("secring.gpg"), "private keys of gpg"),
        (Name("private-keys-v1.d"), "private keys of gpg"),
        (Name("wallet.dat"), "money"),
        // Folders of secrets, should one lie inside an allowed folder.
        (Name(".ssh"), "keys, known hosts"),
        (Name(".gnupg"), "keys"),
        (Name(".password-store"), "passwords"),
        (Name(".aws"), "cloud credentials"),
        (Name(".azure"), "cloud credentials"),
        (Name(".gcloud"), "cloud credentials"),
        (Name("gcloud-config"), "cloud credentials"),
        (Name(".oci"), "cloud credentials"),
        (Name(".kube"), "cluster credentials"),
        (Name(".docker"), "registry credentials"),
        (Name(".mozilla"), "browser profile"),
        (Name(".thunderbird"), "mail profile"),
        (HomeName("keyrings"), "desktop key ring"),
        (Name("kwalletd"), "desktop key ring"),
        (Name(".terraform.d"), "cloud credentials"),
        (HomeName(".config"), "settings of programs: many hold tokens"),
        // Files of credentials anywhere.
        (Name(".netrc"), "passwords by host"),
        (Name("_netrc"), "passwords by host"),
        (Name(".git-credentials"), "passwords by host"),
        (Name(".npmrc"), "registry tokens"),
        (Name(".yarnrc"), "registry tokens"),
        (Name(".yarnrc.yml"), "registry tokens"),
        (Name(".pypirc"), "registry tokens"),
        (Name(".pgpass"), "database passwords"),
        (Name(".my.cnf"), "database passwords"),
        (Name(".mylogin.cnf"), "database passwords"),
        (Name(".s3cfg"), "cloud credentials"),
        (Name(".boto"), "cloud credentials"),
        (Name(".vault-token"), "token"),
        (Name(".terraformrc"), "token"),
        (Name(".dockercfg"), "registry credentials"),
        (Name(".dockerconfigjson"), "registry credentials"),
        (Name(".htpasswd"), "password hashes"),
        (Name(".env"), "settings with secrets by habit"),
        (Prefix(".env."), "settings with secrets by habit"),
        (FileName("credentials"), "credentials of cargo, AWS and others"),
        (FileName("credentials.toml"), "credentials of cargo"),
        (FileName("credentials.json"), "credentials of Google and others"),
        (FileName("credentials.db"), "credentials of gcloud"),
        (FileName("access_tokens.db"), "credentials of gcloud"),
        (FileName("application_default_credentials.json"), "credentials of Google"),
        (FileName("service_account.json"), "credentials of Google"),
        (FileName("kubeconfig"), "cluster credentials"),
        (FileName("accesstokens.json"), "credentials of Azure"),
        (FileName("msal_token_cache.json"), "credentials of Azure"),
        (FileName("azureprofile.json"), "credentials of Azure"),
        (FileName("auth.json"), "registry and coding agent credentials"),
        (FileName("hosts.yml"), "token of gh"),
        (FileName("settings-security.xml"), "passwords of Maven"),
        (FileName("fetch_head"), "may hold a URL with a token"),
        // Browser data bases.
        (FileName("logins.json"), "browser passwords"),
        (FileName("key4.db"), "browser keys"),
        (FileName("key3.db"), "browser keys"),
        (FileName("cookies.sqlite"), "browser sessions"),
        (FileName("cookies"), "browser sessions"),
        (FileName("login data"), "browser passwords"),
        // What was typed.
        (FileName(".bash_history"), "typed commands"),
        (FileName(".zsh_history"), "typed commands"),
        (FileName(".sh_history"), "typed commands"),
        (FileName(".history"), "typed commands"),
        (FileName(".python_history"), "typed commands"),
        (FileName(".node_repl_history"), "typed commands"),
        (FileName(".psql_history"), "typed commands"),
        (FileName(".mysql_history"), "typed commands"),
        (FileName(".sqlite_history"), "typed commands"),
        (FileName(".rediscli_history"), "typed commands"),
        (FileName(".irb_history"), "typed commands"),
        (FileName(".ghci_history"), "typed commands"),
        (Name(".histfile"), "typed commands"),
        (Name(".viminfo"), "typed text"),
        (Name(".lesshst"), "typed text"),
        // The home's own.
        (HomeName(".git"), "remote URLs may hold tokens; tools run without it"),
        (HomePath(".m2/settings.xml"), "passwords of Maven"),
        (HomePath(".rustup/downloads"), "not needed"),
        (HomePath(".rustup/tmp"), "not needed"),
        (HomePath(".cargo/registry/.package-cache"), "lock"),
    ]
};

/// Where file content is looked at before a file is served: such files hold a secret only
/// sometimes, and tools need them.
pub const CONTENT_CHECKED: &[Denied] = &[
    Denied::Path("etc"),
    Denied::HomePath(".cargo/config"),
    Denied::HomePath(".cargo/config.toml"),
    Denied::HomePath(".cargo/env"),
    Denied::FileName("config"),
    Denied::FileName("pip.conf"),
    Denied::FileName("gradle.properties"),
    Denied::FileName("settings.xml"),
];

/// Largest file that is looked at; a larger one in those places is not served.
pub const CONTENT_CHECKED_MAX: u64 = 4 << 20;

/// The deny list, compiled for a home and quick enough for a million names.
#[derive(Debug)]
pub(crate) struct Rules {
    home: Vec<u8>,
    cargo_git: Vec<u8>,
    paths: BTreeMap<Vec<u8>, ()>,
    names: BTreeMap<&'static [u8], ()>,
    file_names: BTreeMap<&'static [u8], ()>,
    home_names: Vec<&'static [u8]>,
    prefixes: Vec<&'static [u8]>,
    suffixes: Vec<&'static [u8]>,
    etc_prefixes: Vec<&'static [u8]>,
    etc_suffixes: Vec<&'static [u8]>,
    checked_paths: Vec<Vec<u8>>,
    checked_names: Vec<&'static [u8]>,
}

impl Rules {
    /// Compiles the lists for a home, given relative to the root and without a leading slash.
    pub(crate) fn new(home: &[u8]) -> Rules {
        let mut rules = Rules {
            home: home.to_vec(),
            cargo_git: join(home, b".cargo/git"),
            paths: BTreeMap::new(),
            names: BTreeMap::new(),
            file_names: BTreeMap::new(),
            home_names: Vec::new(),
            prefixes: Vec::new(),
            suffixes: Vec::new(),
            etc_prefixes: Vec::new(),
            etc_suffixes: Vec::new(),
            checked_paths: Vec::new(),
            checked_names: Vec::new(),
        };
        for (denied, _) in DENY {
            rules.add(*denied);
        }
        for checked in CONTENT_CHECKED {
            match checked {
                Denied::Path(path) => rules.checked_paths.push(path.as_bytes().to_vec()),
                Denied::HomePath(path) => rules.checked_paths.push(join(home, path.as_bytes())),
                Denied::Name(name)
                | Denied::FileName(name)
                | Denied::HomeName(name)
                | Denied::Prefix(name)
                | Denied::Suffix(name)
                | Denied::EtcPrefix(name)
                | Denied::EtcSuffix(name) => rules.checked_names.push(name.as_bytes()),
            }
        }
        rules
    }

    fn add(&mut self, denied: Denied) {
        match denied {
            Denied::Path(path) => drop(self.paths.insert(path.as_bytes().to_vec(), ())),
            Denied::HomePath(path) => {
                self.paths.insert(join(&self.home, path.as_bytes()), ());
            }
            Denied::Name(name) => drop(self.names.insert(name.as_bytes(), ())),
            Denied::FileName(name) => drop(self.file_names.insert(name.as_bytes(), ())),
            Denied::HomeName(name) => self.home_names.push(name.as_bytes()),
            Denied::Prefix(text) => self.prefixes.push(text.as_bytes()),
            Denied::Suffix(text) => self.suffixes.push(text.as_bytes()),
            Denied::EtcPrefix(text) => self.etc_prefixes.push(text.as_bytes()),
            Denied::EtcSuffix(text) => self.etc_suffixes.push(text.as_bytes()),
        }
    }

    /// Says whether an entry is kept out by name. `path` is relative to the root and ends with the
    /// entry's name; a denied folder is never entered, so its inside needs no rule.
    pub(crate) fn denies(&self, path: &[u8], is_folder: bool) -> bool {
        let mut buffer = [0u8; 256];
        let name = lower_name(path, &mut buffer);
        self.names.contains_key(name)
            || (!is_folder && self.file_names.contains_key(name))
            || self.prefixes.iter().any(|prefix| name.starts_with(prefix))
            || self.suffixes.iter().any(|suffix| name.ends_with(suffix))
            || (is_under(path, b"etc")
                && (self.etc_prefixes.iter().any(|prefix| name.starts_with(prefix))
                    || self.etc_suffixes.iter().any(|suffix| name.ends_with(suffix))))
            || (self.home_names.contains(&name)
                && is_under(path, &self.home)
                && !is_under(path, &self.cargo_git))
            || self.paths.contains_key(path)
    }

    /// Says whether a regular file's content must be looked at before it is served.
    pub(crate) fn wants_look(&self, path: &[u8]) -> bool {
        let mut buffer = [0u8; 256];
        let name = lower_name(path, &mut buffer);
        self.checked_paths.iter().any(|checked| path == &**checked || is_under(path, checked))
            || (self.checked_names.contains(&name) && is_under(path, &self.home))
    }
}

/// Says whether text holds what is a secret wherever it stands: a private key, a token, or a URL
/// with a password. `in_home` files are tools' settings, where more words mean a secret.
pub(crate) fn holds_secret(content: &[u8], in_home: bool) -> bool {
    let lower = content.to_ascii_lowercase();
    let has = |needle: &[u8]| lower.windows(needle.len()).any(|window| window == needle);
    has(b"private key-----")
        || has(b"_authtoken")
        || has(b"aws_secret_access_key")
        || has(b"putty-user-key-file")
        || holds_url_with_password(&lower)
        || (in_home
            && [&b"token"[..], b"secret", b"password", b"passwd", b"api_key", b"apikey"]
                .into_iter()
                .any(has))
}

/// `scheme://user:password@host`, or `scheme://token@host` for https.
fn holds_url_with_password(text: &[u8]) -> bool {
    let mut rest = text;
    while let Some(at) = rest.windows(3).position(|window| window == b"://") {
        let https = rest[..at].ends_with(b"http") || rest[..at].ends_with(b"https");
        rest = &rest[at + 3..];
        let end = rest
            .iter()
            .position(|b| b.is_ascii_whitespace() || matches!(b, b'/' | b'"' | b'\'' | b'>'))
            .unwrap_or(rest.len());
        let authority = &rest[..end];
        if let Some(user_end) = authority.iter().rposition(|b| *b == b'@')
            && user_end > 0
            && (https || authority[..user_end].contains(&b':'))
        {
            return true;
        }
    }
    false
}

/// Joins two relative paths.
pub(crate) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        return name.to_vec();
    }
    [folder, b"/", name].concat()
}

/// Says whether a path lies strictly beneath a folder.
pub(crate) fn is_under(path: &[u8], folder: &[u8]) -> bool {
    folder.is_empty()
        || (path.len() > folder.len() && path[folder.len()] == b'/' && path.starts_with(folder))
}

fn lower_name<'a>(path: &[u8], buffer: &'a mut [u8; 256]) -> &'a [u8] {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
    let len = name.len().min(buffer.len());
    for (low, byte) in buffer.iter_mut().zip(name) {
        *low = byte.to_ascii_lowercase();
    }
    &buffer[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_deny_rule_is_lower_case_and_relative() {
        for (rule, why) in DENY {
            let (Denied::Path(text)
            | Denied::HomePath(text)
            | Denied::Name(text)
            | Denied::FileName(text)
            | Denied::Prefix(text)
            | Denied::Suffix(text)
            | Denied::HomeName(text)
            | Denied::EtcPrefix(text)
            | Denied::EtcSuffix(text)) = rule;
            assert!(!text.starts_with('/') && !text.ends_with('/'), "{text}");
            assert!(!why.is_empty());
            if !matches!(rule, Denied::Path(_) | Denied::HomePath(_)) {
                assert_eq!(*text, text.to_ascii_lowercase(), "names are compared in lower case");
                assert!(!text.contains('/'), "{text}");
            }
        }
    }

    #[test]
    fn names_of_secrets_are_denied_and_source_code_is_not() {
        let rules = Rules::new(b"home/u");
        for secret in [
            "etc/shadow",
            "etc/shadow-",
            "etc/sudoers.d",
            "etc/ssh/ssh_host_rsa_key",
            "usr/local/share/id_ed25519",
            "opt/app/.env",
            "home/u/.cargo/credentials.toml",
            "home/u/go/.NETRC",
            "home/u/.pyenv/.git",
        ] {
            assert!(rules.denies(secret.as_bytes(), false), "{secret}");
        }
        for needed in [
            "etc/passwd",
            "etc/ssl/certs/ca-certificates.crt",
            "usr/include/linux/id_map.h",
            "home/u/.cargo/registry/src/x/src/credentials.rs",
            "home/u/.cargo/git/checkouts/x/.git",
            "usr/bin/env",
        ] {
            assert!(!rules.denies(needed.as_bytes(), false), "{needed}");
        }
        assert!(!rules.denies(b"home/u/go/pkg/mod/aws/credentials", true), "a package folder");
        assert!(rules.denies(b"home/u/go/credentials", false));
    }

    #[test]
    fn content_tells_secrets_from_settings() {
        assert!(holds_secret(b"-----BEGIN OPENSSH PRIVATE KEY-----", false));
        assert!(holds_secret(b"deb https://user:pa55@packages.example/ x main", false));
        assert!(holds_secret(b"url = https://ghp_abc@github.com/x", false));
        assert!(holds_secret(b"[registries.x]\ntoken = \"y\"", true));
        assert!(!holds_secret(b"deb http://mirror.example.org/debian bookworm main", false));
        assert!(!holds_secret(b"# http://example.com/ mail me@example.com", false));
        assert!(!holds_secret(b"[source.crates-io]\nreplace-with = \"mirror\"", true));
    }
}
