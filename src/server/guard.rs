//! Who may ask: names of the host, origins of web pages, keys.

use std::net::IpAddr;

use axum::http::{HeaderMap, Method, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, ApiResult};

/// The keys that open the server; none at all leaves it open.
#[derive(Clone, Default)]
pub struct Keys {
    hashes: Vec<[u8; 32]>,
}

/// Whose request it is: the place of its key, or everybody where there are no keys.
pub type Owner = u64;

impl Keys {
    /// Empty keys are left out.
    pub fn new(keys: impl IntoIterator<Item = String>) -> Self {
        let keys = keys.into_iter().filter(|key| !key.is_empty());
        Keys {
            hashes: keys
                .map(|key| Sha256::digest(key.as_bytes()).into())
                .collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Whose key the request carries, as `Authorization: Bearer` or `x-api-key`.
    ///
    /// Hashes of equal length are compared, all of them, in constant time: how long that takes says
    /// nothing about how much of a key was right, or which one it was.
    ///
    /// # Errors
    /// 401 if there are keys and the request has none of them.
    pub fn owner(&self, headers: &HeaderMap) -> ApiResult<Owner> {
        if self.is_empty() {
            return Ok(0);
        }
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
            let value = value.as_bytes();
            let scheme = value.get(..7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then(|| &value[7..])
        });
        let api_key = headers.get("x-api-key").map(|value| value.as_bytes());
        let mut owner = None;
        for key in [bearer, api_key].into_iter().flatten() {
            let hash: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
            for (index, known) in self.hashes.iter().enumerate() {
                if bool::from(known.ct_eq(&hash)) {
                    owner = Some(index as Owner + 1);
                }
            }
        }
        owner.ok_or_else(|| {
            let message = "invalid API key; send `Authorization: Bearer KEY` or `x-api-key: KEY`";
            let mut error =
                ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
            error.code = Some("invalid_api_key");
            error
        })
    }
}

/// Which names the server answers to, and which web pages may use it.
#[derive(Clone, Default)]
pub struct Origins {
    /// Besides localhost and IP addresses; `*` is any
    pub hosts: Vec<String>,
    /// `*` is any
    pub cors: Vec<String>,
}

impl Origins {
    /// Refuses names that a foreign DNS server may have pointed here, and pages of other origins.
    ///
    /// The origin to be allowed by CORS headers, if there is one.
    pub fn check(&self, headers: &HeaderMap) -> ApiResult<Option<String>> {
        let text = |name| {
            let value = headers.get(name)?;
            Some(value.to_str().unwrap_or("(not text)"))
        };
        let host = text(header::HOST).unwrap_or("");
        if !self.is_own(host_name(host)) {
            return Err(ApiError::forbidden(format!(
                "host `{host}` is not a name of this server; use localhost or an IP address, or \
                 start it with --allow-host {}",
                host_name(host)
            )));
        }
        let Some(origin) = text(header::ORIGIN) else {
            return Ok(None);
        };
        if self
            .cors
            .iter()
            .any(|listed| listed == "*" || listed == origin)
        {
            return Ok(Some(origin.to_owned()));
        }
        let same = origin
            .split_once("://")
            .is_some_and(|(_, rest)| rest == host);
        match same {
            true => Ok(None),
            false => Err(ApiError::forbidden(format!(
                "origin `{origin}` may not use this server; start it with --cors-origin {origin}"
            ))),
        }
    }

    fn is_own(&self, name: &str) -> bool {
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        // HTTP/1.0 and Unix sockets have none. DNS rebinding needs a name, never an address.
        name.is_empty()
            || name.eq_ignore_ascii_case("localhost")
            || bare.parse::<IpAddr>().is_ok()
            || (self.hosts.iter()).any(|host| host == "*" || host.eq_ignore_ascii_case(name))
    }
}

/// The name of `name:port`.
fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => {
            name
        }
        _ => host,
    }
}

/// Paths that need no key: they say nothing that matters.
pub fn is_public(method: &Method, path: &str) -> bool {
    matches!(path, "/health" | "/v1/health" | "/moectl/live")
        || (path == "/" && matches!(*method, Method::HEAD | Method::GET))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        let parsed =
            |(name, value): &(header::HeaderName, &str)| (name.clone(), value.parse().unwrap());
        pairs.iter().map(parsed).collect()
    }

    #[test]
    fn a_name_that_was_pointed_here_is_refused_and_addresses_are_not() {
        let origins = Origins::default();
        for host in [
            "localhost:8080",
            "127.0.0.1",
            "[::1]:80",
            "192.168.1.7:1",
            "",
        ] {
            assert!(
                origins.check(&headers(&[(header::HOST, host)])).is_ok(),
                "{host}"
            );
        }
        for host in [
            "evil.example:8080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
        ] {
            assert!(
                origins.check(&headers(&[(header::HOST, host)])).is_err(),
                "{host}"
            );
        }
    }

    #[test]
    fn only_listed_pages_and_its_own_may_use_the_server() {
        let origins = Origins {
            cors: vec!["https://chat.example".into()],
            ..Origins::default()
        };
        let check = |origin| {
            let host = (header::HOST, "localhost:8080");
            origins.check(&headers(&[host, (header::ORIGIN, origin)]))
        };
        assert_eq!(check("http://localhost:8080").unwrap(), None);
        let listed = check("https://chat.example").unwrap();
        assert_eq!(listed.as_deref(), Some("https://chat.example"));
        assert!(check("https://evil.example").is_err());
        assert!(check("null").is_err());
        assert!(check("http://localhost:8081").is_err());
    }

    #[test]
    fn any_of_several_keys_opens_and_says_whose_it_is() {
        let keys = Keys::new(["one".to_owned(), "two".to_owned(), String::new()]);
        let bearer = |key: &str| {
            let value = format!("Bearer {key}");
            keys.owner(&headers(&[(header::AUTHORIZATION, &value)]))
        };
        assert_eq!(bearer("one").unwrap(), 1);
        assert_eq!(bearer("two").unwrap(), 2);
        for wrong in ["", "on", "one two", "onee"] {
            assert_eq!(bearer(wrong).unwrap_err().status, 401);
        }
        let x_api_key = header::HeaderName::from_static("x-api-key");
        assert_eq!(keys.owner(&headers(&[(x_api_key, "two")])).unwrap(), 2);
        assert!(Keys::default().owner(&HeaderMap::new()).is_ok());
    }
}
