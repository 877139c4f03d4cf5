//! `tow inspect`: everything known about sandboxes.

use clap::Args;

use crate::cluster::{Cluster, Start};
use crate::commands::Env;
use crate::error::{Exit, Outcome};
use crate::output::{human, json};
use crate::sandbox;

/// Arguments of `tow inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Names or ids
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Print an object per sandbox
    #[arg(long)]
    pub json: bool,
}

pub(super) async fn run(args: InspectArgs, env: &Env) -> Outcome {
    let cluster = Cluster::open(env, Start::UnlessDown).await?;
    for name in &args.names {
        let object = json::sandbox(&sandbox::find(&cluster, name).await?);
        match env.printer.json() {
            true => env.printer.object(&object)?,
            false => lines(&object, 0).iter().try_for_each(|line| env.printer.answer(line))?,
        }
    }
    Ok(Exit::OK)
}

/// Lays an object out for people: a field per line, nested ones indented.
fn lines(object: &serde_json::Value, depth: usize) -> Vec<String> {
    let Some(fields) = object.as_object() else { return Vec::new() };
    let mut all = Vec::new();
    for (name, value) in fields {
        let indent = "  ".repeat(depth);
        let text = match value {
            serde_json::Value::Null => continue,
            serde_json::Value::Object(_) => {
                all.push(format!("{indent}{name}:"));
                all.extend(lines(value, depth + 1));
                continue;
            }
            serde_json::Value::String(text) if text.is_empty() => continue,
            serde_json::Value::String(text) => human::printable(text),
            other => other.to_string(),
        };
        if !(depth == 0 && name == "schema") {
            all.push(format!("{indent}{name}: {text}"));
        }
    }
    all
}
