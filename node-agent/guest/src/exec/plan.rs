//! Turns what a client asked for, and the sandbox's settings, into exactly what the child will do.
//!
//! Pure but for reading account files: all bytes are checked here, so that the child, which may not
//! allocate, only follows the plan.

use std::collections::BTreeMap;
use std::ffi::CString;

use towline_proto::limits::ARGV_ENV_MAX;
use towline_proto::v1::{ExecStart, StreamErrorCode, Terminal, User};

use crate::credentials;
use crate::refusal::Refusal;
use crate::settings::{DEFAULT_PATH, Settings};

/// Longest path that Linux takes.
const PATH_MAX: usize = 4096;
/// Folders of a PATH that are tried.
const PATH_FOLDERS_MAX: usize = 256;

/// What the child does.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// Absent in host tests: the child stays who the agent is.
    pub(crate) user: Option<User>,
    pub(crate) terminal: Option<Terminal>,
    /// The files to try, in order.
    pub(crate) candidates: Vec<CString>,
    /// `/bin/sh candidate argv[1..]` for a script without an interpreter line; slot 1 is the script.
    pub(crate) shell: CString,
}

/// Makes the plan. Blocks on the sandbox's root file system.
pub(crate) fn plan(
    start: &ExecStart,
    settings: &Settings,
    become_user: bool,
) -> Result<Plan, Refusal> {
    let argv = argv(start, settings)?;
    let user = match start.user.as_ref().or(settings.user.as_ref()) {
        Some(user) => credentials::complete(user.clone(), &settings.files)
            .map_err(|error| Refusal::io("cannot read the sandbox's /etc/passwd", &error))?,
        None => credentials::of_image(&settings.image_user, &settings.files)?,
    };
    let env = environment(start, settings, &user)?;
    let size: usize = argv.iter().chain(&env).map(|bytes| bytes.len() + 9).sum();
    if size > ARGV_ENV_MAX {
        return Err(Refusal::invalid(format!(
            "arguments and environment have {size} bytes together; at most {ARGV_ENV_MAX} are possible"
        )));
    }
    let cwd = if start.cwd.is_empty() { settings.default_cwd() } else { &start.cwd };
    if cwd.first() != Some(&b'/') || cwd.len() >= PATH_MAX {
        return Err(Refusal::invalid("the working directory must be an absolute path"));
    }
    let candidates = candidates(&argv[0], &env)?;
    Ok(Plan {
        argv: c_strings(argv, "an argument")?,
        env: c_strings(env, "the environment")?,
        cwd: c_string(cwd.to_vec(), "the working directory")?,
        user: become_user.then_some(user),
        terminal: start.terminal.clone(),
        candidates,
        shell: c"/bin/sh".into(),
    })
}

/// As docker does: what is typed replaces the image's command, and follows its entrypoint.
fn argv(start: &ExecStart, settings: &Settings) -> Result<Vec<Vec<u8>>, Refusal> {
    let rest = if start.argv.is_empty() { &settings.cmd } else { &start.argv };
    let argv: Vec<Vec<u8>> = settings.entrypoint.iter().chain(rest).cloned().collect();
    match argv.first() {
        None => Err(Refusal::invalid("the image names no command: give one after `--`")),
        Some(first) if first.is_empty() => Err(Refusal::new(
            StreamErrorCode::CommandNotFound,
            "the command's name is empty: give one after `--`",
        )),
        Some(_) => Ok(argv),
    }
}

fn environment(
    start: &ExecStart,
    settings: &Settings,
    user: &User,
) -> Result<Vec<Vec<u8>>, Refusal> {
    let mut env: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    env.insert(b"PATH", DEFAULT_PATH.as_bytes());
    env.insert(b"HOME", &user.home);
    env.insert(b"USER", user.name.as_bytes());
    env.insert(b"LOGNAME", user.name.as_bytes());
    env.insert(b"SHELL", &user.shell);
    if let Some(terminal) = &start.terminal {
        let term = if terminal.term.is_empty() { "xterm" } else { &terminal.term };
        env.insert(b"TERM", term.as_bytes());
    }
    for variable in settings.env.iter().chain(&start.env) {
        let Some(at) = variable.iter().position(|&b| b == b'=').filter(|&at| at > 0) else {
            let text = String::from_utf8_lossy(variable);
            return Err(Refusal::invalid(format!("`{text}` is not NAME=value")));
        };
        env.insert(&variable[..at], &variable[at + 1..]);
    }
    Ok(env.into_iter().map(|(name, value)| [name, b"=", value].concat()).collect())
}

/// A name with a slash is a path; any other is sought in the PATH of the exec itself.
fn candidates(name: &[u8], env: &[Vec<u8>]) -> Result<Vec<CString>, Refusal> {
    if name.contains(&b'/') {
        return Ok(vec![c_string(name.to_vec(), "the command")?]);
    }
    let path = env.iter().find_map(|variable| variable.strip_prefix(b"PATH=")).unwrap_or_default();
    path.split(|&b| b == b':')
        .take(PATH_FOLDERS_MAX)
        .map(|folder| if folder.is_empty() { b"." } else { folder })
        .map(|folder| [folder, b"/", name].concat())
        .filter(|file| file.len() < PATH_MAX)
        .map(|file| c_string(file, "the command"))
        .collect()
}

fn c_strings(all: Vec<Vec<u8>>, what: &str) -> Result<Vec<CString>, Refusal> {
    all.into_iter().map(|bytes| c_string(bytes, what)).collect()
}

fn c_string(bytes: Vec<u8>, what: &str) -> Result<CString, Refusal> {
    CString::new(bytes).map_err(|_| Refusal::invalid(format!("{what} contains a NUL byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(entrypoint: &[&str], cmd: &[&str]) -> Settings {
        let bytes = |all: &[&str]| all.iter().map(|s| s.as_bytes().to_vec()).collect();
        Settings { entrypoint: bytes(entrypoint), cmd: bytes(cmd), ..Settings::default() }
    }

    fn start(argv: &[&str]) -> ExecStart {
        let argv = argv.iter().map(|s| s.as_bytes().to_vec()).collect();
        ExecStart { argv, ..ExecStart::default() }
    }

    #[test]
    fn the_images_command_and_entrypoint_mean_what_docker_means() {
        let argv = |settings, start| {
            plan(&start, &settings, false).map(|plan| {
                plan.argv.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(argv(settings(&[], &["sh"]), start(&[])).unwrap(), ["sh"]);
        assert_eq!(
            argv(settings(&["tini", "--"], &["sh"]), start(&[])).unwrap(),
            ["tini", "--", "sh"]
        );
        assert_eq!(argv(settings(&["tini"], &["sh"]), start(&["ls"])).unwrap(), ["tini", "ls"]);
        assert_eq!(argv(settings(&[], &["sh"]), start(&["ls", "-l"])).unwrap(), ["ls", "-l"]);
        let error = argv(settings(&[], &[]), start(&[])).unwrap_err();
        assert!(error.message.contains("give one after"), "{error}");
    }

    #[test]
    fn the_execs_environment_wins_over_the_images_over_defaults() {
        let settings =
            Settings { env: vec![b"A=1".to_vec(), b"HOME=/x".to_vec()], ..Settings::default() };
        let start = ExecStart { env: vec![b"A=2=3".to_vec()], ..start(&["true"]) };
        let plan = plan(&start, &settings, false).unwrap();
        let env: Vec<_> = plan.env.iter().map(|v| v.to_string_lossy()).collect();
        for wanted in ["A=2=3", "HOME=/x", "USER=root", "SHELL=/bin/sh"] {
            assert!(env.iter().any(|v| v == wanted), "{wanted} in {env:?}");
        }
        assert!(!env.iter().any(|v| v.starts_with("TERM=")), "no terminal, no TERM");
    }

    #[test]
    fn bytes_that_execve_cannot_carry_are_refused() {
        for bad in [
            ExecStart { argv: vec![b"a\0b".to_vec()], ..ExecStart::default() },
            ExecStart { env: vec![b"novalue".to_vec()], ..start(&["true"]) },
            ExecStart { env: vec![b"=x".to_vec()], ..start(&["true"]) },
            ExecStart { cwd: b"relative".to_vec(), ..start(&["true"]) },
            ExecStart {
                argv: vec![b"a".to_vec(), vec![b'x'; ARGV_ENV_MAX]],
                ..ExecStart::default()
            },
        ] {
            let refusal = plan(&bad, &Settings::default(), false).unwrap_err();
            assert_eq!(refusal.code, StreamErrorCode::Invalid, "{refusal}");
        }
    }
}
