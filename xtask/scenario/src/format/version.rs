//! Tells files of the old format from those of the current one.

use serde_json::Value;

/// Returns true if `file`, the JSON of a scenario or a matrix, has steps in the old format.
#[must_use]
pub fn is_old(file: &Value) -> bool {
    let choices = file["axes"].as_array().into_iter().flatten().filter_map(|axis| axis["values"].as_array());
    choices.flatten().any(is_old) || old_steps(&file["steps"])
}

fn old_steps(steps: &Value) -> bool {
    steps.as_array().into_iter().flatten().any(|step| {
        let on_host = ["kill_proxy", "start_proxy", "trace"].iter().any(|action| step[action].is_string());
        step.get("vm").is_some() || on_host || old_steps(&step["repeat"]["steps"])
    })
}
