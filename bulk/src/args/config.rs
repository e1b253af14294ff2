//! The file of `--config`: options in TOML, under the names that they have on the command line.

use clap::{ArgAction, ArgMatches, Command, parser::ValueSource};
use std::{
    ffi::{OsStr, OsString},
    fs,
    path::Path,
};
use toml::de::{DeTable, DeValue};

/// Reads the file, and returns its options as arguments. Options that the command line gives, too, are left out.
///
/// # Errors
///
/// What is wrong, with the line. Values are not shown, because they may hold keys.
pub(super) fn arguments(path: &Path, command: &Command, given: &ArgMatches) -> Result<Vec<OsString>, String> {
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| format!("--config: cannot read {shown}: {error}"))?;
    from_toml(&text, command, given).map_err(|(line, reason)| format!("--config: line {line} of {shown}: {reason}"))
}

fn from_toml(text: &str, command: &Command, given: &ArgMatches) -> Result<Vec<OsString>, (usize, String)> {
    let line = |at: usize| text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1;
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        (line(at), error.message().to_owned())
    })?;
    let mut arguments = Vec::new();
    for (name, value) in table.get_ref() {
        let error = |reason: String| (line(name.span().start), reason);
        let name = &**name.get_ref();
        let option = command
            .get_arguments()
            .find(|option| option.get_long() == Some(name) && !option.is_hide_set() && name != "config")
            .ok_or_else(|| error(format!("`{name}` is not an option")))?;
        let is_flag = matches!(option.get_action(), ArgAction::SetTrue);
        if given.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine) {
            continue;
        }
        match value.get_ref() {
            DeValue::Boolean(is_set) if is_flag => {
                if *is_set {
                    arguments.push(format!("--{name}").into());
                }
            }
            _ if is_flag => return Err(error(format!("`{name}` must be true or false"))),
            DeValue::Array(values) => {
                if !matches!(option.get_action(), ArgAction::Append) {
                    return Err(error(format!("`{name}` has one value, not a list")));
                }
                for value in values {
                    let value = scalar(value.get_ref()).map_err(|reason| error(format!("`{name}` {reason}")))?;
                    arguments.push(format!("--{name}={value}").into());
                }
            }
            value => {
                let value = scalar(value).map_err(|reason| error(format!("`{name}` {reason}")))?;
                arguments.push(format!("--{name}={value}").into());
            }
        }
    }
    Ok(arguments)
}

fn scalar(value: &DeValue<'_>) -> Result<String, &'static str> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_owned()),
        DeValue::Integer(_) => Err("must be a decimal number"),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        DeValue::Boolean(_) => Err("takes a value, not true or false"),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => Err("must be text or a number"),
    }
}

/// Returns the arguments of the command line with those of the file before them.
pub(super) fn before_command_line(from_file: Vec<OsString>, command_line: &[OsString]) -> Vec<OsString> {
    let program = command_line.first().map_or(OsStr::new("bulk"), OsString::as_os_str);
    let rest = command_line.iter().skip(1).cloned();
    [program.to_owned()].into_iter().chain(from_file).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Args;
    use super::*;
    use clap::CommandFactory;

    fn read(text: &str, command_line: &[&str]) -> Result<Vec<OsString>, (usize, String)> {
        let given = Args::command().get_matches_from([&["bulk"], command_line].concat());
        from_toml(text, &Args::command(), &given)
    }

    #[test]
    fn options_of_the_file_have_the_names_of_the_command_line() {
        let text = "rpm = 600\nresume = true\nkeep-going = false\nheader = [\"a: 1\", \"b: 2\"]\nestimate-times = 1.5";
        let arguments = [
            "--estimate-times=1.5",
            "--header=a: 1",
            "--header=b: 2",
            "--resume",
            "--rpm=600",
        ];
        assert_eq!(read(text, &[]).unwrap(), arguments.map(OsString::from));
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let arguments = read("rpm = 600\ntpm = \"off\"", &["--rpm", "30"]).unwrap();
        assert_eq!(arguments, ["--tpm=off"].map(OsString::from));
        let all = before_command_line(arguments, &["bulk", "--rpm", "30"].map(OsString::from));
        assert_eq!(all, ["bulk", "--tpm=off", "--rpm", "30"].map(OsString::from));
    }

    #[test]
    fn an_unknown_name_is_an_error_with_its_line() {
        let (line, reason) = read("rpm = 600\n\nrpn = \"secret\"", &[]).unwrap_err();
        assert_eq!((line, reason.as_str()), (3, "`rpn` is not an option"));
        assert_eq!(read("config = \"other\"", &[]).unwrap_err().0, 1);
    }

    #[test]
    fn an_error_shows_no_value() {
        for bad in [
            "url = \"secret",
            "rpm = [600]\nurl=\"secret\"",
            "keep-going = \"secret\"",
            "url = { secret = 1 }",
        ] {
            let (_, reason) = read(bad, &[]).unwrap_err();
            assert!(!reason.contains("secret"), "{reason}");
        }
    }
}
