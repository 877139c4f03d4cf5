//! Imported images: a name and what it means now. Their bytes lie on nodes.

use std::collections::BTreeMap;

use towline_proto::v1::{self, Image, image_ref::Source};

use crate::refusal::Refusal;

/// Images by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Images {
    pub(crate) by_name: BTreeMap<String, Image>,
}

impl Images {
    /// All, in order of name.
    pub fn iter(&self) -> impl Iterator<Item = &Image> {
        self.by_name.values()
    }

    pub(super) fn put(&mut self, image: &Image, now_ms: u64) -> Image {
        let image = Image { created_ms: now_ms, ..image.clone() };
        self.by_name.insert(image.name.clone(), image.clone());
        image
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<(), Refusal> {
        match self.by_name.remove(name) {
            Some(_) => Ok(()),
            None => Err(no_image(name)),
        }
    }

    /// The manifest digest that a reference means: by digest, by name, by name with `:latest`.
    /// A local image has none.
    pub fn digest_of(&self, image: Option<&v1::ImageRef>) -> Result<String, Refusal> {
        match image.and_then(|image| image.source.as_ref()) {
            None => Err(Refusal::invalid("no image: name one with --image, or use --image local")),
            Some(Source::Local(_)) => Ok(String::new()),
            Some(Source::Oci(name)) if name.starts_with("sha256:") => {
                match self.by_name.values().any(|image| &image.digest == name) {
                    true => Ok(name.clone()),
                    false => Err(no_image(name)),
                }
            }
            Some(Source::Oci(name)) => {
                let found = self.by_name.get(name);
                let found = found.or_else(|| self.by_name.get(&format!("{name}:latest")));
                found.map(|image| image.digest.clone()).ok_or_else(|| no_image(name))
            }
        }
    }
}

fn no_image(name: &str) -> Refusal {
    let name: String = name.chars().take(200).collect();
    Refusal::not_found(format!(
        "no image `{}`: bring it in with `tow image pull` or `tow image import`, list with `tow image ls`",
        name.escape_debug()
    ))
}
