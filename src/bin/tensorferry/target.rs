//! Where a checkpoint goes: a server or a local folder.

use std::{
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
};
use tensorferry::{Error, plan::CheckpointName};

/// What a DEST means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// `ferry://authority/name` or `authority:name`; the name may be empty.
    Server {
        /// Host and, where given, port.
        authority: String,
        /// Checkpoint name or prefix, without slashes at its ends.
        name: String,
    },
    /// Everything else.
    Folder(PathBuf),
}

impl Target {
    /// `://` makes a URL; a colon before the first slash `host:name`; else it is a
    /// local path.
    pub(crate) fn parse(text: &OsStr) -> Result<Target, Error> {
        Target::read(text, false)
    }

    /// The same where no checkpoint has to be named: `host:7744` is ambiguous then.
    pub(crate) fn parse_place(text: &OsStr) -> Result<Target, Error> {
        Target::read(text, true)
    }

    fn read(text: &OsStr, may_be_nameless: bool) -> Result<Target, Error> {
        let Some(plain) = text.to_str() else {
            return Ok(Target::Folder(Path::new(text).to_owned()));
        };
        if plain.is_empty() {
            return Err(Error::Usage("the destination is empty".to_owned()));
        }
        if let Some((scheme, rest)) = plain.split_once("://") {
            // A folder may well have "://" further in: only before the first slash it is a URL.
            if !scheme.contains('/') {
                return url(plain, scheme, rest);
            }
        }
        let first = plain.split('/').next().unwrap_or_default();
        // The colons of an IPv6 address stand in brackets.
        let host_len = if first.starts_with('[') {
            first.find(']').map_or(0, |at| at + 1)
        } else {
            0
        };
        match first[host_len..].find(':') {
            None => Ok(Target::Folder(PathBuf::from(plain))),
            Some(0) if host_len == 0 => Err(Error::Usage(format!(
                "{plain:?} names no host; a local folder is written ./{plain}"
            ))),
            Some(at) => {
                let (host, name) = (&plain[..host_len + at], &plain[host_len + at + 1..]);
                let digits = name.split(['/', ':']).next().unwrap_or_default();
                // Nobody can tell whether a name or a port was meant.
                if !digits.is_empty()
                    && (may_be_nameless || digits.len() < name.len())
                    && digits.bytes().all(|b| b.is_ascii_digit())
                {
                    let rest = name.get(digits.len() + 1..).unwrap_or_default();
                    let rest = rest.trim_start_matches('/');
                    return Err(Error::Usage(format!(
                        "{plain:?} may mean a port: write ferry://{host}:{digits}/{rest}, or \
                         ferry://{host}/{name} for a checkpoint of that name"
                    )));
                }
                Ok(server(host, name))
            }
        }
    }
}

fn url(whole: &str, scheme: &str, rest: &str) -> Result<Target, Error> {
    if scheme != "ferry" {
        return Err(Error::Usage(format!(
            "{whole:?} is not a ferry:// address: {scheme:?} is not known"
        )));
    }
    let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.is_empty() {
        return Err(Error::Usage(format!("{whole:?} names no host")));
    }
    Ok(server(authority, name))
}

fn server(authority: &str, name: &str) -> Target {
    Target::Server {
        authority: authority.to_owned(),
        name: name.trim_matches('/').to_owned(),
    }
}

/// The name of the checkpoint on a server, which a push cannot do without.
pub(crate) fn checkpoint_name(authority: &str, name: &str) -> Result<CheckpointName, Error> {
    if name.is_empty() {
        return Err(Error::Usage(format!(
            "no checkpoint is named: write ferry://{authority}/NAME"
        )));
    }
    Ok(name.parse()?)
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Server { authority, name } => write!(f, "ferry://{authority}/{name}"),
            Target::Folder(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target, Error> {
        Target::parse(OsStr::new(text))
    }

    #[test]
    fn urls_hosts_and_folders_are_told_apart() {
        for (text, authority, name) in [
            ("ferry://lab:7744/run7", "lab:7744", "run7"),
            ("ferry://lab/run7/step-9/", "lab", "run7/step-9"),
            ("ferry://[::1]:9/x", "[::1]:9", "x"),
            ("ferry://lab", "lab", ""),
            ("lab:run7", "lab", "run7"),
            ("lab:a/b", "lab", "a/b"),
            ("lab:", "lab", ""),
            ("lab:2024", "lab", "2024"),
            ("[::1]:run7", "[::1]", "run7"),
        ] {
            assert_eq!(parse(text).unwrap(), server(authority, name), "{text}");
        }
        for folder in ["out", "./a:b", "/x/y:z", "../a", ".", "a/b://c"] {
            assert_eq!(
                parse(folder).unwrap(),
                Target::Folder(folder.into()),
                "{folder}"
            );
        }
        for bad in [
            "",
            "http://lab/x",
            "ferry:///x",
            ":x",
            "lab:7744/run7",
            "lab:7744:run7",
        ] {
            assert!(matches!(parse(bad), Err(Error::Usage(_))), "{bad}");
        }
    }

    #[test]
    fn digits_may_be_a_port_where_no_name_is_needed() {
        let place = |text: &str| Target::parse_place(OsStr::new(text));
        for bad in ["lab:2024", "[::1]:2024", "lab:7744/run7"] {
            assert!(matches!(place(bad), Err(Error::Usage(_))), "{bad}");
        }
        assert_eq!(place("lab:").unwrap(), server("lab", ""));
        assert_eq!(place("lab:run7").unwrap(), server("lab", "run7"));
        assert_eq!(place("ferry://lab/2024").unwrap(), server("lab", "2024"));
    }

    #[test]
    fn a_push_needs_a_name() {
        assert!(checkpoint_name("lab", "").is_err());
        assert!(checkpoint_name("lab", "../x").is_err());
        assert_eq!(checkpoint_name("lab", "a/b").unwrap().as_str(), "a/b");
    }
}
