//! How a row of a table leads to the entity that it belongs to.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

#[derive(Clone, Debug)]
pub enum EntityPathConfig {
    Column(String),
    Through(ThroughConfig),
}

impl<'de> Deserialize<'de> for EntityPathConfig {
    /// By hand, since serde's own untagged enums cannot tell what is wrong.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Path;

        impl<'de> Visitor<'de> for Path {
            type Value = EntityPathConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column's name, or { through = \"table\", column = \"name\" }")
            }

            fn visit_str<E: de::Error>(self, column: &str) -> Result<Self::Value, E> {
                Ok(EntityPathConfig::Column(column.to_string()))
            }

            fn visit_map<A: MapAccess<'de>>(self, keys: A) -> Result<Self::Value, A::Error> {
                ThroughConfig::deserialize(MapAccessDeserializer::new(keys)).map(EntityPathConfig::Through)
            }
        }

        deserializer.deserialize_any(Path)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThroughConfig {
    pub through: String,
    pub column: String,
    /// The same name as `column` if not given.
    pub their_column: Option<String>,
}
