//! Templates in the styles that models ship, and hostile ones.

use super::*;

fn conversation(turns: &[(Role, &str)]) -> Conversation {
    Conversation {
        turns: turns.iter().map(|(role, text)| Turn::new(*role, *text)).collect(),
        tools: Vec::new(),
    }
}

fn compile(source: &str) -> Result<ChatTemplate> {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": null});
    ChatTemplate::new(&source.into(), &config, Path::new("chat_template.jinja"))
}

fn check(source: &str, turns: &[(Role, &str)], expect: std::result::Result<&str, &str>) {
    let found = compile(source).unwrap().render(&conversation(turns));
    match (found, expect) {
        (Ok(found), Ok(expect)) => assert_eq!(found.text, expect, "{source}"),
        (Err(found), Err(part)) => assert!(found.contains(part), "{source}: {found}"),
        (found, _) => panic!("{source}: {found:?}"),
    }
}

const TURNS: &[(Role, &str)] = &[(Role::User, "hi"), (Role::Assistant, "yes")];

#[test]
fn renders_as_transformers_does() {
    let each = |body: &str| format!("{{% for m in messages %}}{body}{{% endfor %}}");
    check(
        &each("{{ bos_token + m.role + m['content'] + eos_token }}"),
        TURNS,
        Ok("<s>userhi</s><s>assistantyes</s>"),
    );
    check(&each("{{ m.content.strip().upper()[:1] }}"), TURNS, Ok("HY"));
    check(
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}hi{{ messages[::-1][0].content }}",
        TURNS,
        Ok("2hiyes"),
    );
    check(
        &each("{% if loop.last %}{% break %}{% endif %}{{ m.content }}"),
        TURNS,
        Ok("hi"),
    );
    check(
        &each("{% generation %}{{ m.content }}{%- endgeneration -%} "),
        TURNS,
        Ok("hiyes"),
    );
    check(
        "  {% if true %}\nx\n  {% endif %}\n{{ pad_token }}{{ strftime_now('%d %b %Y') }}\n",
        TURNS,
        Ok("x\n26 Jul 2024"),
    );
    check(
        &each("{{ m | tojson }}"),
        &TURNS[..1],
        Ok(r#"{"role": "user", "content": "hi"}"#),
    );
}

#[test]
fn refusals_are_reasons() {
    check(
        "{{ raise_exception('no ' + messages[0].role) }}",
        TURNS,
        Err("refuses it: no user"),
    );
    check("{{ messages[9].content.x }}", TURNS, Err("refuses"));
    check(
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        TURNS,
        Err("fuel"),
    );
    check(
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        TURNS,
        Err("refuses"),
    );
    check("{{ 'a' * 1000000000000 }}", TURNS, Err("refuses"));
    for source in [
        "{% for",
        "{% endfor %}",
        "{{ a | nofilter",
        "{% generation %}",
        &"{{ (".repeat(9000),
    ] {
        assert!(compile(source).is_err(), "{source:.20}");
    }
}

#[test]
fn multimodal_templates_get_parts() {
    let source = "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ m.role }}:{{ c['text'] }};{% endfor %}{% endfor %}";
    check(source, TURNS, Ok("user:hi;assistant:yes;"));
}

#[test]
fn a_refused_system_turn_opens_the_first_user_turn() {
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
    let turns = [
        (Role::System, "be brief"),
        (Role::User, "hi"),
        (Role::Assistant, "yes"),
    ];
    let rendered = compile(source).unwrap().render(&conversation(&turns)).unwrap();
    assert_eq!(rendered.text, "user:be brief\n\nhi;assistant:yes;");
    assert!(rendered.system_folded);
}

#[test]
fn tool_calls_reach_templates_that_know_them_and_stay_text_elsewhere() {
    let call = r#"{"name": "f", "arguments": {"x": 1}}"#;
    let turns = [
        (Role::User, "hi"),
        (Role::FunctionCall, call),
        (Role::Observation, "seen"),
        (Role::Assistant, "yes"),
    ];
    let plain = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
    check(
        plain,
        &turns,
        Ok(&format!("user:hi;assistant:{call};user:seen;assistant:yes;")),
    );
    let knows = "{% for m in messages %}{% if m.role == 'tool' %}<{{ m.content }}>{% elif m.tool_calls %}{% for t in m.tool_calls %}{{ t.function.name }}({{ t.function.arguments | tojson }}){% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    check(knows, &turns, Ok(r#"hif({"x": 1})<seen>yes"#));
}

#[test]
fn named_templates() {
    let named = json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]);
    let template = ChatTemplate::new(&named, &Value::Null, Path::new("x")).unwrap();
    let mut c = conversation(TURNS);
    assert_eq!(template.render(&c).unwrap().text, "d");
    c.tools = vec![json!({"type": "function", "function": {}})];
    assert_eq!(template.render(&c).unwrap().text, "t1");
    assert!(ChatTemplate::new(&json!([{"name": "x"}]), &Value::Null, Path::new("x")).is_err());
    assert!(ChatTemplate::new(&json!(3), &Value::Null, Path::new("x")).is_err());
}
