//! Which name each made-up address stands for. An address is never given to a second name, so that
//! a program that remembers one never reaches somebody else.

use std::collections::HashMap;
use std::sync::Arc;

use super::addresses::{NAMES_FIRST, NAMES_MAX};

/// Longest name, as text without its final dot.
pub(super) const NAME_MAX: usize = 253;

/// The names that were asked for and exist, in the order of their numbers.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_number: Vec<Arc<str>>,
    by_name: HashMap<Arc<str>, u32>,
}

impl Names {
    /// The number of a name in lower case; a new one gets the next. `None`: no number is left.
    pub(super) fn bind(&mut self, name: &str) -> Option<u32> {
        if let Some(number) = self.by_name.get(name) {
            return Some(*number);
        }
        if self.by_number.len() >= NAMES_MAX {
            return None;
        }
        let number = NAMES_FIRST + u32::try_from(self.by_number.len()).ok()?;
        let name: Arc<str> = name.into();
        self.by_number.push(Arc::clone(&name));
        self.by_name.insert(name, number);
        Some(number)
    }

    /// The name with this number.
    pub(super) fn name(&self, number: u32) -> Option<Arc<str>> {
        let index = usize::try_from(number.checked_sub(NAMES_FIRST)?).ok()?;
        self.by_number.get(index).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_and_numbers_run_out() {
        let mut names = Names::default();
        let first = names.bind("a.example").unwrap();
        assert_eq!(names.bind("b.example"), Some(first + 1));
        assert_eq!(names.bind("a.example"), Some(first));
        for index in 2..NAMES_MAX {
            assert!(names.bind(&format!("n{index}.example")).is_some());
        }
        assert_eq!(names.bind("one-more.example"), None, "no address is used twice");
        assert_eq!(names.bind("b.example"), Some(first + 1));
        assert_eq!(names.name(first).as_deref(), Some("a.example"));
        assert_eq!(names.name(first - 1), None);
        assert_eq!(names.name(u32::MAX), None);
    }
}
