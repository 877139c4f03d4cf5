//! The system's git configuration with the laptop's identity in front: whatever the image, the user
//! or a repository says of its own comes later and wins.

use towline_proto::v1::GitIdentity;

/// Makes the file: the identity, then what the image has.
pub fn with_identity(identity: &GitIdentity, image: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in [("name", &identity.name), ("email", &identity.email)] {
        // Bounded and free of control characters when it was admitted; what is not is left out.
        if !value.is_empty() && !value.chars().any(char::is_control) {
            if text.is_empty() {
                text.extend_from_slice(b"[user]\n");
            }
            text.extend_from_slice(format!("\t{key} = \"{}\"\n", escaped(value)).as_bytes());
        }
    }
    text.extend_from_slice(image);
    text
}

/// In quotes, only the quote and the backslash mean something.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stderr, reason = "says what was skipped")]

    use super::*;
    use std::process::Command;

    fn identity(name: &str, email: &str) -> GitIdentity {
        GitIdentity { name: name.into(), email: email.into() }
    }

    #[test]
    fn nothing_is_added_for_nobody_and_no_value_breaks_out_of_its_line() {
        assert_eq!(with_identity(&identity("", ""), b"[core]\n"), b"[core]\n");
        let text = with_identity(&identity("a\n[core]\nx = y", "b@c"), b"");
        assert_eq!(text, b"[user]\n\temail = \"b@c\"\n");
    }

    #[test]
    fn git_reads_the_values_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("gitconfig");
        let get = |key: &str| {
            let output =
                Command::new("git").args(["config", "--file"]).arg(&file).arg(key).output();
            output.map(|output| String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
        };
        for name in ["Ada Lovelace", "Å \"quoted\" \\ back", "# not ; a comment", " spaces "] {
            std::fs::write(
                &file,
                with_identity(&identity(name, "a@b"), b"[core]\n\tpager = cat\n"),
            )
            .unwrap();
            match get("user.name") {
                Ok(got) => assert_eq!(got, name.trim_end()),
                Err(_) => return eprintln!("SKIPPED: git is not installed"),
            }
            assert_eq!(get("core.pager").unwrap(), "cat");
        }
        // The image's own identity wins.
        std::fs::write(&file, with_identity(&identity("Ada", "a@b"), b"[user]\n\tname = Bob\n"))
            .unwrap();
        assert_eq!(get("user.name").unwrap(), "Bob");
    }
}
