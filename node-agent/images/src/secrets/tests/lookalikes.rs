//! What must not be found: what stands in documentation, lock files, certificates and programs.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::random::Random;
use super::scan;

#[test]
fn nothing_is_found_where_nothing_is() {
    let found = lookalikes().into_iter().filter_map(|(path, content)| {
        let found = scan(path, content.as_bytes());
        (!found.is_empty()).then_some((content, found))
    });
    let found: Vec<_> = found.collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn nothing_is_found_in_random_bytes_and_their_base64() {
    let bytes = Random::new(5).bytes(1 << 20);
    assert_eq!(scan("srv/photo.jpg", &bytes), []);
    let text = STANDARD.encode(&bytes[..300_000]);
    assert_eq!(scan("srv/page.html", format!("data:image/png;base64,{text}").as_bytes()), []);
    let lines: Vec<&str> = text.as_bytes().chunks(76).map(|l| str::from_utf8(l).unwrap()).collect();
    assert_eq!(scan("srv/mail", lines.join("\n").as_bytes()), []);
    let hex: String = bytes[..200_000].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(scan("srv/SHA256SUMS", hex.as_bytes()), []);
}

fn lookalikes() -> Vec<(&'static str, String)> {
    let mut r = Random::new(11);
    [documentation(&mut r), code(), certificates(&mut r), digests(&mut r), system(&mut r)]
        .into_iter()
        .flatten()
        .collect()
}

fn named(path: &'static str, texts: &[&str]) -> Vec<(&'static str, String)> {
    texts.iter().map(|text| (path, (*text).to_owned())).collect()
}

fn documentation(r: &mut Random) -> Vec<(&'static str, String)> {
    let part = |json: &str| URL_SAFE_NO_PAD.encode(json);
    let shown = format!(
        "{}.{}.{}",
        part(r#"{"alg":"HS256","typ":"JWT"}"#),
        part(r#"{"sub":"1234567890","name":"John Doe","iat":1516239022}"#),
        r.alnum(43)
    );
    let unsigned =
        format!("{}.{}.{}", part(r#"{"alg":"none"}"#), part(r#"{"sub":"robot"}"#), r.alnum(43));
    let mut all = named(
        "usr/share/doc/x/README",
        &[
            &["aws_access_key_id = AKIA", "IOSFODNN7EXAMPLE"].concat(),
            &["aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "/bPxRfiCYEXAMPLEKEY"].concat(),
            "password=changeme",
            "password = \"<your password>\"",
            "password: ${DB_PASSWORD}",
            "api_key: YOUR_API_KEY_HERE_PLEASE_1",
            "token = \"xxxxxxxxxxxxxxxxxxxxxxxxxxxx\"",
            "token: {{ vault_token_value_1 }}",
            "secret: ****************",
            "Authorization: Bearer <token>",
            "Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==",
            "curl -u user:password https://corp.net/",
            "curl -u \"$USER:$PASSWORD\" https://corp.net/",
            "https://user:password@host/path",
            "https://user:pass@example.com/",
            "https://alice:s3cr3t99@git.example.org/x.git",
            "ftp://user:$PASSWORD@ftp.corp.net/",
            "postgres://postgres:postgres@localhost:5432/app",
            "mysql://user:<password>@db.corp.net/x",
            "ssh://git@github.com:22/x/y.git",
            "http://[::1]:8080/@scope/package",
            "https://cdn.corp.net:8443/npm/@scope/package@1.2.3",
            "machine host.domain.com login myself password secret",
            "export GITHUB_TOKEN=ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
            "ghp_your_token_goes_here_and_no_real_one_at_all",
            "kubeadm join --token abcdef.0123456789abcdef",
            "mysql --password",
            "--password-file /run/secrets/database-1",
            "The password is hunter2, and the token is secret.",
            "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEF...\n",
        ],
    );
    all.push(("usr/share/doc/jwt.html", shown));
    all.push(("usr/share/doc/jwt.html", unsigned));
    all.extend(named("srv/app/.env.example", &["DB_PASSWORD=postgres", "API_TOKEN=abcd1234"]));
    all.extend(named("srv/app/.env", &["PORT=3000", "API_TOKEN=", "DB_PASSWORD=${OTHER}"]));
    all
}

fn code() -> Vec<(&'static str, String)> {
    named(
        "usr/lib/x/main.js",
        &[
            "var token = getAuthorizationToken2(request);",
            "password = config.database.password2;",
            "if (password == \"aB3xK9mQ2pL7\") {}",
            "const secretName = \"aB3xK9mQ2pL7wE5t\";",
            "credentials: LegacyAndGoogleAuthCredentialsUnionType,",
            "\"secret\": \"V1SecretVolumeSource\",",
            "f(private_key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)",
            "private_key: ed25519.Ed25519PrivateKey, x",
            "token: \"kubernetes-v1-28-prod-eu1-main2\"",
            "oauth_token=\"ad180jjd733klru7\"",
            "password: \"$Env3Xyq\"",
            "secret: \"/run/q7Hs0Xw2LpV9tRkE\"",
            "Secrets::Chacha20Poly1305AndMoreOfIt2x9 {",
            "core::Token>_RINvMNtNtNtCsi4IsKQVxMg0_3std4sync4mpmc6selectNtB<",
            "token_unit,json=tokenUnit,enum=proto2.StreamOptions_TokenUnit",
            "token_endpoint = \"https://login.corp.net/oauth2/v2.0/token\"",
            "passwordInput: \"#form1-Password2.Input\"",
            "self.password_hash = \"pbkdf2_sha256_1\"",
            "tokenizer = \"cl100k_Base2xQ9z8w7\"",
            "PublicKeyToken=b03f5f7f11d50a3a",
            "nextPageToken: \"CAUQAA1b2C3d4E5f6G7h8\"",
            "csrf_token = \"9f1c07ae53b2d84e6a0f7d1c9be2438a\"",
            "primary_key=True",
            "api_key = os.environ[\"API_KEY_2\"]",
            "#define PASSWORD_MAX_LENGTH 128",
            "case Token::Plus2 => \"+\",",
            "secret: &'static str,",
            "token: Option<HashMap<String, u8>>",
            "!function(e,t){e.exports=t()}(this,function(){var sk=1,hf_=2,password=e.p1,token=r.T2x;",
            "s.abcdefGhij1klmnOpqrstu2v",
            "task-abcdefghijklmnopqrstuvwxyz0123456789",
            "disk-0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
            "re_compile_pattern_internals",
            "EAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "PrivateKey = load_private_key_from_configuration_file(settings)",
        ],
    )
}

fn certificates(r: &mut Random) -> Vec<(&'static str, String)> {
    let armor = |r: &mut Random, kind: &str| {
        format!("-----BEGIN {kind}-----\n{}-----END {kind}-----\n", r.armor(12))
    };
    let mut all: Vec<(&str, String)> =
        ["CERTIFICATE", "PUBLIC KEY", "RSA PUBLIC KEY", "PGP PUBLIC KEY BLOCK", "X509 CRL"]
            .map(|kind| ("etc/ssl/certs/x.pem", armor(r, kind)))
            .into();
    let ssh = r.base64(43);
    all.push((
        "root/.ssh/authorized_keys",
        format!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{ssh} robot@corp.net"),
    ));
    all.push((
        "root/.ssh/known_hosts",
        format!("github.com ssh-rsa AAAAB3NzaC1yc2E{}", r.base64(300)),
    ));
    all.push(("etc/wireguard/wg0.conf", format!("PublicKey = {}=", r.base64(43))));
    all.push((
        "srv/keys.json",
        format!(r#"{{"kty":"EC","crv":"P-256","x":"{}","y":"{}"}}"#, r.alnum(43), r.alnum(43)),
    ));
    all.push(("etc/ssl/certs/java/cacerts", "\u{fe}\u{ed}x".to_owned()));
    all
}

fn digests(r: &mut Random) -> Vec<(&'static str, String)> {
    vec![
        ("srv/app/Cargo.lock", format!("checksum = \"{}\"", r.hex(64))),
        ("srv/app/package-lock.json", format!("\"integrity\": \"sha512-{}==\"", r.base64(86))),
        (
            "srv/app/package-lock.json",
            format!("\"js-tokens\": \"{}\", \"token\": \"{}\"", r.base64(40), r.base64(40)),
        ),
        ("srv/app/go.sum", format!("corp.net/token v1.2.3 h1:{}=", r.base64(43))),
        ("srv/app/.git/HEAD", r.hex(40)),
        ("srv/app/.git/packed-refs", format!("{} refs/heads/token\n", r.hex(40))),
        ("var/lib/dpkg/info/passwd.md5sums", format!("{}  usr/bin/passwd", r.hex(32))),
        ("usr/share/x", format!("id: {}", r.uuid())),
        ("usr/share/x", format!("token_id = \"{}\"", r.uuid())),
        ("usr/share/x", format!("session-token: {}", r.uuid())),
        ("usr/share/x", format!("\"secret\": \"sha256:{}\"", r.hex(64))),
        ("usr/share/x", format!("passwd.deb {} {}", r.hex(32), r.hex(64))),
        ("usr/share/x", format!("url(data:font/woff2;base64,{})", r.base64(4000))),
    ]
}

fn system(r: &mut Random) -> Vec<(&'static str, String)> {
    let mut all = named(
        "etc/shadow",
        &[
            "root:*:19000:0:99999:7:::",
            "daemon:!:19000::::::",
            "u:!*:19000:0:99999:7:::",
            "v::1::::::",
        ],
    );
    all.extend(named(
        "usr/share/man/man5/shadow.5",
        &[
            "root:$6$salt$hash:19000:0:99999:7:::",
            "The hash is $y$j9T$salt$encrypted, see crypt(5).",
            ".B \\-\\-password \\fIPASSWORD\\fR",
            ".BR passwd (1) \\- change user password",
        ],
    ));
    all.push((
        "etc/pam.d/common-password",
        "password [success=1 default=ignore] pam_unix.so".to_owned(),
    ));
    all.push(("etc/login.defs", "ENCRYPT_METHOD SHA512\nPASS_MAX_DAYS 99999".to_owned()));
    all.push(("etc/machine-id", r.hex(32)));
    all.push((
        "usr/lib/x.so",
        "-----BEGIN RSA PRIVATE KEY-----\0-----BEGIN EC PRIVATE KEY-----\0".into(),
    ));
    all.push((
        "usr/lib/x.so",
        "PuTTY-User-Key-File-2: \0Private-Lines: %d\0AGE-SECRET-KEY-1\0".into(),
    ));
    all.push((
        "usr/lib/x.so",
        "password=%s\0token=%08x\0Authorization: Basic %s\0https://%s:%s@%s".into(),
    ));
    all
}
