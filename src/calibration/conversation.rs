//! A conversation, and LLaMA-Factory's rules on what is one: who may speak when, and which rows are abnormal.
//!
//! Owns roles, turns and alternation. It must not know columns, files or templates.

use serde_json::{Map, Value};
use std::borrow::Cow;

/// Why a row is left out. The number of distinct reasons is small: they are counted, not listed.
pub type Reason = Cow<'static, str>;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The instructions before the first turn.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// What a tool answered.
    Observation,
    /// The model calling a tool; the text is JSON with `name` and `arguments`.
    FunctionCall,
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Who speaks.
    pub role: Role,
    /// What is said, without media.
    pub text: String,
    /// Keys of an openai message other than role and content: `tool_calls`, `name`, `reasoning_content`, …
    pub extra: Map<String, Value>,
}

impl Turn {
    /// A turn of plain text.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            text: text.into(),
            extra: Map::new(),
        }
    }
}

/// A system text, turns that alternate, and the tools on offer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// In order; a system turn stands first.
    pub turns: Vec<Turn>,
    /// JSON schemas of the tools, each as `{"type": "function", "function": {…}}`.
    pub tools: Vec<Value>,
}

/// How messages name their parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Tags {
    /// Key of the role in a message.
    pub role: String,
    /// Key of the text in a message.
    pub content: String,
    /// What each role is called; `None` where a dataset has no such role.
    pub user: Option<String>,
    /// The model's turns.
    pub assistant: Option<String>,
    /// Tool answers.
    pub observation: Option<String>,
    /// Tool calls.
    pub function: Option<String>,
    /// The system turn.
    pub system: Option<String>,
    /// Take other usual names of the roles as well: on where nothing describes the dataset.
    pub lenient: bool,
}

impl Tags {
    /// `from`/`value`, with human, gpt, observation, function_call and system.
    pub fn sharegpt() -> Self {
        Self::named("from", "value", "human", "gpt", "observation")
    }

    /// `role`/`content`, with user, assistant, tool, function_call and system.
    pub fn openai() -> Self {
        Self::named("role", "content", "user", "assistant", "tool")
    }

    fn named(role: &str, content: &str, user: &str, assistant: &str, observation: &str) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            user: Some(user.into()),
            assistant: Some(assistant.into()),
            observation: Some(observation.into()),
            function: Some("function_call".into()),
            system: Some("system".into()),
            lenient: false,
        }
    }

    /// The role that `name` stands for.
    pub fn find(&self, name: &str) -> Option<Role> {
        let named = [
            (&self.system, Role::System),
            (&self.user, Role::User),
            (&self.assistant, Role::Assistant),
            (&self.observation, Role::Observation),
            (&self.function, Role::FunctionCall),
        ];
        let by_tag = named
            .iter()
            .find_map(|(tag, role)| (tag.as_deref() == Some(name)).then_some(*role));
        by_tag.or(match name {
            _ if !self.lenient => None,
            "system" | "developer" => Some(Role::System),
            "human" | "user" => Some(Role::User),
            "gpt" | "assistant" | "model" | "chatgpt" | "bot" => Some(Role::Assistant),
            "observation" | "tool" | "function" | "ipython" => Some(Role::Observation),
            "function_call" => Some(Role::FunctionCall),
            _ => None,
        })
    }
}

/// Puts the system text first and checks the rest: turns of user or observation and of assistant or function call in
/// strict alternation, ending in an answer. `answer_follows`: the answer stands in a column of its own.
pub(super) fn aligned(
    mut turns: Vec<Turn>,
    system: Option<&str>,
    answer_follows: bool,
) -> Result<Vec<Turn>, Reason> {
    let system = match turns.first() {
        Some(first) if first.role == Role::System => Some(turns.remove(0)),
        _ => system
            .filter(|text| !text.is_empty())
            .map(|text| Turn::new(Role::System, text)),
    };
    if turns.is_empty() {
        return Err("the conversation has no turns".into());
    }
    let mut asks = true;
    let mut last = None;
    for turn in &turns {
        // Answers of several tools to one message of calls count as one turn.
        if turn.role == Role::Observation && last == Some(Role::Observation) {
            continue;
        }
        let expected = match asks {
            true => [Role::User, Role::Observation],
            false => [Role::Assistant, Role::FunctionCall],
        };
        if !expected.contains(&turn.role) {
            return Err("the roles of the conversation do not alternate".into());
        }
        asks = !asks;
        last = Some(turn.role);
    }
    match (asks, answer_follows) {
        (true, false) | (false, true) => {}
        (false, false) => return Err("the conversation does not end in an answer".into()),
        (true, true) => {
            return Err("the conversation ends in an answer before the chosen one".into());
        }
    }
    Ok(system.into_iter().chain(turns).collect())
}

/// The tools of a row: a list, or the same as a JSON string; bare function schemas are wrapped as templates expect them.
pub(super) fn tools(value: &Value) -> Result<Vec<Value>, Reason> {
    let parsed;
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::String(text) if text.trim().is_empty() => return Ok(Vec::new()),
        Value::String(text) => {
            parsed =
                serde_json::from_str::<Value>(text).map_err(|_| Reason::from("the tools are not JSON"))?;
            &parsed
        }
        other => other,
    };
    let list = match list {
        Value::Array(list) => list.as_slice(),
        Value::Object(_) => std::slice::from_ref(list),
        Value::Null => &[],
        _ => return Err("the tools are no list".into()),
    };
    list.iter()
        .map(|tool| match tool.get("type") {
            _ if !tool.is_object() => Err("a tool is no JSON object".into()),
            Some(_) if tool.get("function").is_some() => Ok(tool.clone()),
            _ => Ok(serde_json::json!({"type": "function", "function": tool})),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Role::*;

    #[test]
    fn roles_alternate_as_llamafactory_wants() {
        let check = |roles: &[Role], follows: bool, expect: Result<usize, &str>| {
            let turns = roles.iter().map(|&r| Turn::new(r, "t")).collect();
            let found = aligned(turns, Some("s"), follows);
            match expect {
                Ok(count) => assert_eq!(found.map(|t| t.len()), Ok(count), "{roles:?}"),
                Err(part) => assert!(found.unwrap_err().contains(part), "{roles:?}"),
            }
        };
        check(&[User, Assistant], false, Ok(3));
        check(&[System, User, Assistant], false, Ok(3));
        check(&[User, FunctionCall, Observation, Assistant], false, Ok(5));
        check(
            &[User, FunctionCall, Observation, Observation, Assistant],
            false,
            Ok(6),
        );
        check(&[User], true, Ok(2));
        check(&[], false, Err("no turns"));
        check(&[System], false, Err("no turns"));
        check(&[User], false, Err("end in an answer"));
        check(&[User, Assistant], true, Err("before the chosen"));
        check(&[Assistant, User], false, Err("alternate"));
        check(&[User, User, Assistant], false, Err("alternate"));
        check(&[User, System, Assistant], false, Err("alternate"));
    }

    #[test]
    fn tools_are_wrapped() {
        let check = |given: Value, expect: Option<usize>| {
            assert_eq!(tools(&given).ok().map(|t| t.len()), expect, "{given}");
        };
        let bare = serde_json::json!({"name": "f", "parameters": {}});
        assert_eq!(tools(&bare).unwrap()[0]["function"]["name"], "f");
        check(Value::Null, Some(0));
        check("".into(), Some(0));
        check(format!("[{bare}, {bare}]").into(), Some(2));
        check("[".into(), None);
        check(3.into(), None);
        check(serde_json::json!([3]), None);
    }
}
