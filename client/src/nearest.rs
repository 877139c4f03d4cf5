//! "Did you mean": the nearest known word to an unknown one, for errors about configuration.
//!
//! Pure text; nothing here decides anything.

/// Explains a TOML error in one or two lines; an unknown key names the nearest known one.
pub fn explain_toml(error: &toml::de::Error) -> String {
    let message = error.message();
    match unknown_field(message) {
        Some((got, known)) => match nearest(got, &known) {
            Some(near) => format!("unknown key `{got}`: did you mean `{near}`?"),
            None => format!("unknown key `{got}` (known: {})", known.join(", ")),
        },
        None => error.to_string().trim_end().to_owned(),
    }
}

/// Takes serde's "unknown field `x`, expected one of `a`, `b`" apart.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (got, rest) = rest.split_once('`')?;
    let known = rest.split('`').skip(1).step_by(2).collect();
    Some((got, known))
}

/// Returns the known word that is at most a third of its letters away, if any.
pub fn nearest<'a>(got: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, word) =
        known.iter().map(|word| (distance(got, word), *word)).min_by_key(|(d, _)| *d)?;
    (distance <= (word.chars().count().max(3) / 3).max(1)).then_some(word)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nearest_word_or_none() {
        let known = ["image", "shape", "env"];
        assert_eq!(nearest("imge", &known), Some("image"));
        assert_eq!(nearest("enviroment", &known), None);
        assert_eq!(nearest("evn", &known), None);
        assert_eq!(nearest("shap", &known), Some("shape"));
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
